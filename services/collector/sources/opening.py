"""Opens the source that the settings name. Called by the collector's assembly."""

from services.collector.sources.base import Reader, Source
from services.collector.sources.dealing import DealtSource
from services.collector.sources.fields import Fields
from shared.errors import SettingsError
from shared.settings import DocumentsSettings


def open_source(documents: DocumentsSettings, *, seed: int, vocabulary_size: int) -> Source:
    """Raises SourceError if no file matches, SettingsError if no path is given."""
    if not documents.path:
        raise SettingsError("documents.path is empty: name a file, folder, glob or Hugging Face dataset")
    fields = Fields(
        text_field=documents.text_field,
        token_ids_field=documents.token_ids_field,
        id_field=documents.id_field,
        max_document_bytes=documents.max_document_bytes,
        vocabulary_size=vocabulary_size,
    )
    return DealtSource(
        reader=_open_reader(documents),
        fields=fields,
        num_parts=documents.num_parts,
        shuffle_buffer=documents.shuffle_buffer,
        shuffle_bytes=documents.shuffle_bytes,
        seed=seed,
    )


def _open_reader(documents: DocumentsSettings) -> Reader:
    if documents.format == "jsonl":
        from services.collector.sources.jsonl import JsonlReader

        return JsonlReader(documents.path, max_document_bytes=documents.max_document_bytes)
    if documents.format == "parquet":
        from services.collector.sources.parquet import ParquetReader

        return ParquetReader(documents.path, columns=_columns(documents))
    if documents.format == "text":
        from services.collector.sources.text import TextReader

        if documents.token_ids_field:
            raise SettingsError("documents.token_ids_field does not go with documents.format = 'text'")
        return TextReader(
            documents.path, text_field=documents.text_field, max_document_bytes=documents.max_document_bytes
        )
    from services.collector.sources.huggingface import HuggingFaceReader

    return HuggingFaceReader(
        documents.path, subset=documents.subset, split=documents.split, columns=_columns(documents)
    )


def _columns(documents: DocumentsSettings) -> tuple[str, ...]:
    return (documents.token_ids_field or documents.text_field, documents.id_field)

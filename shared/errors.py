"""The error tree: one class per boundary, with the HTTP status of its answer and whether a retry may succeed.

Services answer with `{"error": {"type": ..., "message": ...}}`, which clients raise as `ServiceError`.

    raise SettingsError("trainer.beta must be > 0, got -0.1")
"""

from shared.secret_urls import without_secrets


class HeadwaterError(Exception):
    """Root of all errors; the message says what is wrong, where, and the remedy. URLs in it lose their secrets."""

    status = 500
    retryable = False

    def __init_subclass__(cls, *, status: int | None = None, retryable: bool | None = None) -> None:
        cls.status = cls.status if status is None else status
        cls.retryable = cls.retryable if retryable is None else retryable

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class SettingsError(HeadwaterError, status=400):
    """A configuration file, environment variable or command-line value is wrong."""


class SourceError(HeadwaterError):
    """A document source as a whole can't be read (a single bad line is a `Refusal`, not an error)."""


class SourceReadError(SourceError, retryable=True):
    """One attempt to read from a source failed; a retry may succeed."""


class RequestError(HeadwaterError, status=422):
    """A request is well-formed JSON but can't be answered."""


class AuthError(HeadwaterError, status=401):
    """The bearer token is missing or wrong."""


class RequestTooLargeError(HeadwaterError, status=413):
    """The body is longer than `max_request_bytes`."""


class TokenIdsNeededError(HeadwaterError, status=428):
    """The judge scores the policy's token ids, and the request has none: send them too."""


class OverloadedError(HeadwaterError, status=503, retryable=True):
    """A bounded queue is full; the answer carries Retry-After."""


class EngineError(HeadwaterError, status=503, retryable=True):
    """The language-model engine behind a service failed or isn't ready."""


class PromptError(EngineError, status=422, retryable=False):
    """The engine can never answer this prompt (empty, or too long for the model): a retry can't help."""


class ServiceError(HeadwaterError, status=502):
    """Seen by a client: a service answered with an error or could not be reached."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class StreamError(HeadwaterError, status=503, retryable=True):
    """The Redis stream can't be reached, or an entry on it can't be decoded."""


class StreamSchemaError(HeadwaterError):
    """The stream has entries of another version of Headwater. They are not dropped."""


class FencedError(HeadwaterError, status=409):
    """Another collector has taken the part, or another trainer the run: nothing was written, stop working on it."""


class WeightStoreError(HeadwaterError, status=409):
    """A weight version is missing, incomplete or does not match its checksums."""


class WeightStoreAwayError(WeightStoreError, status=503, retryable=True):
    """The weight store can't be reached or written just now."""


class DatabaseError(HeadwaterError, status=503, retryable=True):
    """The database can't be reached, is locked, or has another schema version."""


class DatabaseRefusalError(DatabaseError, status=500, retryable=False):
    """The database refuses a statement (a number out of range, a constraint, no such table): a retry can't help."""


class TrainingError(HeadwaterError):
    """Training can't continue (too many non-finite losses, an unusable checkpoint)."""


class CollectingError(HeadwaterError):
    """Collecting can't continue: too many windows in a row could not be scored."""

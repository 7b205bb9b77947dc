"""The error tree: one class per boundary, each with the HTTP status that a service answers with.

Services answer with `{"error": {"type": ..., "message": ...}}` (services/app.py), clients turn that into a
`ServiceError`. `retryable` tells whether the same request may succeed later.

    raise SettingsError("trainer.beta must be > 0, got -0.1")
"""

from shared.secret_urls import without_secrets


class HeadwaterError(Exception):
    """Root of all errors that Headwater raises; the message says what is wrong, where, and the remedy.

    Messages end up in logs, tables and answers, so secrets are removed from all URLs in them.
    """

    status = 500
    retryable = False

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class SettingsError(HeadwaterError):
    """A configuration file, environment variable or command-line value is wrong."""

    status = 400


class SourceError(HeadwaterError):
    """A document source as a whole can't be read (a single bad line is a `Refusal`, not an error)."""


class SourceReadError(SourceError):
    """One attempt to read from a source failed; a retry may succeed."""

    retryable = True


class RequestError(HeadwaterError):
    """A request is well-formed JSON but can't be answered."""

    status = 422


class AuthError(HeadwaterError):
    """The bearer token is missing or wrong."""

    status = 401


class RequestTooLargeError(HeadwaterError):
    """The body is longer than `max_request_bytes`."""

    status = 413


class TokenIdsNeededError(HeadwaterError):
    """The judge scores the policy's token ids, and the request has none: send them too."""

    status = 428


class OverloadedError(HeadwaterError):
    """A bounded queue is full; the answer carries Retry-After."""

    status = 503
    retryable = True


class EngineError(HeadwaterError):
    """The language-model engine behind a service failed or isn't ready."""

    status = 503
    retryable = True


class PromptError(EngineError):
    """The engine can never answer this prompt (empty, or too long for the model): a retry can't help."""

    status = 422
    retryable = False


class VerdictError(HeadwaterError):
    """A judge's answer has no readable verdict. Never a score."""

    status = 502
    retryable = True


class ServiceError(HeadwaterError):
    """Seen by a client: a service answered with an error or could not be reached."""

    status = 502

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class StreamError(HeadwaterError):
    """The Redis stream can't be reached, or an entry on it can't be decoded."""

    status = 503
    retryable = True


class StreamSchemaError(HeadwaterError):
    """The stream has entries of another version of Headwater. They are not dropped."""


class FencedError(HeadwaterError):
    """Another collector has taken the part: nothing was written, stop working on it."""

    status = 409


class WeightStoreError(HeadwaterError):
    """A weight version is missing, incomplete or does not match its checksums."""

    status = 409


class DatabaseError(HeadwaterError):
    """The database can't be reached, is locked, or has another schema version."""

    status = 503
    retryable = True


class DatabaseRefusalError(DatabaseError):
    """The database refuses a statement (a number out of range, a constraint, no such table): a retry can't help."""

    status = 500
    retryable = False


class TrainingError(HeadwaterError):
    """Training can't continue (too many non-finite losses, an unusable checkpoint)."""

"""The error tree: one class per boundary, each with the HTTP status that a service answers with.

Services render any `HeadwaterError` as `{"error": {"type": ..., "message": ...}}` (services/app.py);
clients turn such an answer back into `ServiceError`. `retryable` tells the collector whether the same
request may succeed later.
"""

from shared.secret_urls import without_secrets


class HeadwaterError(Exception):
    """Root of all errors that Headwater raises on purpose; the message says what, where and the remedy.

    It goes into logs, tables and answers, so the URLs in it, other libraries' too, lose their secrets.
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
    """One attempt to read from a source failed; the same may succeed when it is made again."""

    retryable = True


class RequestError(HeadwaterError):
    """A request to a service is well-formed JSON but can't be answered as asked."""

    status = 422


class AuthError(HeadwaterError):
    """The bearer token is missing or wrong."""

    status = 401


class RequestTooLargeError(HeadwaterError):
    """The body is longer than `max_request_bytes`."""

    status = 413


class TokenIdsNeededError(HeadwaterError):
    """The judge scores the policy's token ids, and the request has none: the same with them can be answered."""

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
    """The engine can never answer this prompt (too long for the model, empty): trying again is no use."""

    status = 422
    retryable = False


class VerdictError(HeadwaterError):
    """A judge's answer holds no readable verdict. Never a score."""

    status = 502
    retryable = True


class ServiceError(HeadwaterError):
    """A service answered with an error or could not be reached (client side)."""

    status = 502

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class StreamError(HeadwaterError):
    """The Redis stream can't be reached, or an entry on it can't be decoded."""

    status = 503
    retryable = True


class StreamSchemaError(HeadwaterError):
    """The stream holds entries of another version of Headwater. Nothing is dropped: they wait for their reader."""


class FencedError(HeadwaterError):
    """Another collector has taken the part since: nothing was written, and the work on it ends here."""

    status = 409


class WeightStoreError(HeadwaterError):
    """A weight version is missing, incomplete or does not match its checksums."""

    status = 409


class DatabaseError(HeadwaterError):
    """The database can't be reached, is locked, or has another schema version."""

    status = 503
    retryable = True


class DatabaseRefusalError(DatabaseError):
    """The database was reached and refuses what it was asked (a number out of range, a constraint, no such table):
    trying again is no use."""

    status = 500
    retryable = False


class TrainingError(HeadwaterError):
    """Training can't go on (non-finite losses in a row, an unusable checkpoint)."""

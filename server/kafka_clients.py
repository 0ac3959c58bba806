"""What every Kafka client is told alike: where the brokers are, and how to speak with them safely.

Knows no topic, and nothing of what a client is for.
"""

from __future__ import annotations

from operator import methodcaller
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException

from server.config import Settings
from server.events import BadEvent

_LOGIN: Final = "KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD or KAFKA_SASL_MECHANISM is not what the brokers expect"
_ACL: Final = "the brokers' ACLs do not let KAFKA_SASL_USERNAME do what it has to"
_TIMES: Final = "the topic perhaps bounds the time of records: `scoreboard check` looks, `scoreboard migrate` mends it"
_REFUSALS: Final = {
    KafkaError._AUTHENTICATION: _LOGIN,
    KafkaError.SASL_AUTHENTICATION_FAILED: _LOGIN,
    KafkaError.UNSUPPORTED_SASL_MECHANISM: _LOGIN,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: _ACL,
    KafkaError.GROUP_AUTHORIZATION_FAILED: _ACL,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: _ACL,
    KafkaError.INVALID_TIMESTAMP: _TIMES,
    KafkaError.INVALID_RECORD: _TIMES,  # what newer brokers say of a time that is out of bounds
    KafkaError._SSL: "KAFKA_SSL_CA_FILE and the name in KAFKA_BROKERS do not fit the brokers' certificate",
}

# Not message.headers(): in code that runs often, CPython no longer looks whether a method of C failed after all. It
# would take the null pointer, and the process would end with a segmentation fault.
_read_headers: Final = methodcaller("headers")


def client_settings(settings: Settings) -> dict[str, Any]:
    """For librdkafka: brokers, encryption and login; holds the password, so it is never to be shown."""
    client = {
        "bootstrap.servers": settings.kafka_brokers,
        "security.protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.startswith("sasl"):
        client["sasl.mechanism"] = settings.kafka_sasl_mechanism
        client["sasl.username"] = settings.kafka_sasl_username
        client["sasl.password"] = settings.kafka_sasl_password
    if settings.kafka_ssl_ca_file:
        client["ssl.ca.location"] = settings.kafka_ssl_ca_file
    return client


def headers_of(message: Any) -> list[tuple[str, bytes | None]]:
    """The headers of a record; in a loop the only safe way to them.

    Raises BadEvent when a name among them is not UTF-8. The library has a null pointer in its place then, and hands it
    out at the next call without any error: so such a record is left without headers.
    """
    try:
        return _read_headers(message) or []
    except SystemError as error:
        message.set_headers([])
        raise BadEvent("headers: expected names in UTF-8") from error


def advice(error: KafkaError) -> str:
    """Which variables to look at, if it is no outage: the brokers are there, but will not have us. Else nothing."""
    hint = _REFUSALS.get(error.code(), "")
    if not hint and "security.protocol" in error.str():  # its own guess, when it is hung up on at once
        hint = "KAFKA_SECURITY_PROTOCOL is perhaps not what the brokers expect"
    return hint


def refusal(error: KafkaError) -> KafkaError | None:
    """The same error with the variables to look at, if it is no outage.

    To librdkafka brokers that will not have us come and go like any others, and what they are asked times out; why is
    said through `error_cb`, from within a `poll`.
    """
    hint = advice(error)
    return KafkaError(error.code(), f"{hint}: {error.str()}") if hint else None


def is_refusal(error: object) -> bool:
    """Whether brokers answered, and said no; everything else is an outage."""
    if isinstance(error, KafkaException):
        error = error.args[0]
    return isinstance(error, KafkaError) and (_was_said(error) or bool(advice(error)))


def reason_of(error: KafkaError) -> str:
    """Why Kafka is of no use now, in words that everybody may read: they name no address."""
    hint = advice(error)
    if hint:
        return f"Kafka refuses: {hint}"
    # What brokers say is a text of the library's own.
    return f"Kafka refuses: {KafkaError(error.code()).str()}" if _was_said(error) else "Kafka does not answer"


def _was_said(error: KafkaError) -> bool:
    """Whether it is an answer of brokers; the library's own errors are negative."""
    return error.code() > 0 and error.code() != KafkaError.REQUEST_TIMED_OUT

"""What every Kafka client is told alike: where the brokers are, and how to speak with them safely.

Knows no topic, and nothing of what a client is for.
"""

from __future__ import annotations

from typing import Any, Final

from confluent_kafka import KafkaError

from server.config import Settings
from server.events import BadEvent

_LOGIN: Final = "KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD or KAFKA_SASL_MECHANISM is not what the brokers expect"
_ACL: Final = "the brokers' ACLs do not let KAFKA_SASL_USERNAME do what it has to"
_REFUSALS: Final = {
    KafkaError._AUTHENTICATION: _LOGIN,
    KafkaError.SASL_AUTHENTICATION_FAILED: _LOGIN,
    KafkaError.UNSUPPORTED_SASL_MECHANISM: _LOGIN,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: _ACL,
    KafkaError.GROUP_AUTHORIZATION_FAILED: _ACL,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: _ACL,
    KafkaError._SSL: "KAFKA_SSL_CA_FILE and the name in KAFKA_BROKERS do not fit the brokers' certificate",
}


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
    """The headers of a record.

    Raises BadEvent when a name among them is not UTF-8. The library would hand out a null pointer for it, at the second
    call without any error: so such a record is left without headers.
    """
    try:
        return message.headers() or []
    except SystemError as error:
        message.set_headers([])
        raise BadEvent("headers: expected names in UTF-8") from error


def refusal(error: KafkaError) -> KafkaError | None:
    """The same error with the variables to look at, if it is no outage: the brokers are there, but will not have us.

    To librdkafka such brokers come and go like any others, and what they are asked times out; why is said through
    `error_cb`, from within a `poll`.
    """
    code = error.code()
    hint = _REFUSALS.get(code)
    if hint is None and "security.protocol" in error.str():  # its own guess, when it is hung up on at once
        hint = "KAFKA_SECURITY_PROTOCOL is perhaps not what the brokers expect"
    return KafkaError(code, f"{hint}: {error.str()}") if hint else None

"""The sidecar: the relay moves the outbox into Kafka, the persister moves Kafka into TimescaleDB."""

"""Chaos: clients keep a ledger while a seeded script kills, pauses and restarts every part."""

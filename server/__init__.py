"""The server: HTTP and WebSocket in one process, and what sync/ stands on."""

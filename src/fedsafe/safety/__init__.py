"""Guards, the filter on each client, and the constitution on the server."""

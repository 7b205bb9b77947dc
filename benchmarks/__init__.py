"""One script per claim: prints a table, writes JSON, exits 1 when a goal that it could measure is missed."""

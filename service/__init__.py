"""onetime: one-time tokens and email verification codes over gRPC, with their state in PostgreSQL."""

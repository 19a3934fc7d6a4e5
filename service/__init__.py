"""onetime: one-time tokens and email verification codes over gRPC, with their state in PostgreSQL."""

import os

# gRPC writes a line of its own, which is no JSON, for each client whose handshake fails: whoever reaches the port could
# fill our disk. It reads this when it is first imported. Set it to INFO to find out why a client cannot connect.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

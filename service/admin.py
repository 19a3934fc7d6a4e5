"""AdminService: what operators and support do to a user as a whole.

The use cases, from a checked request to the statements of `sql/admin.sql`. Who may call is the policy's business.
"""

from typing import Any
from uuid import UUID

import grpc.aio
from onetime.v1 import admin_pb2 as pb
from onetime.v1 import admin_pb2_grpc as pb_grpc

from service.budgets import EMAIL_VERIFICATION
from service.call import about, current_call
from service.db import Database, Params, load_queries
from service.fields import Fields

_QUERIES = load_queries("admin")

Context = grpc.aio.ServicerContext[Any, Any]


class Admin(pb_grpc.AdminServiceServicer):
    """The servicer. See the proto for what each rpc promises."""

    def __init__(self, database: Database) -> None:
        """Take what the calls share."""
        self._database = database

    async def PurgeUser(self, request: pb.PurgeUserRequest, context: Context) -> pb.PurgeUserResponse:
        """Delete everything of a user, but for what bounds guesses and sends."""
        del context
        fields = Fields()
        user_id = fields.identifier("user_id", request.user_id)
        fields.done()

        about(current_call.get(), user_id=user_id)
        params: Params = {"user_ids": [user_id]}
        statements = ("purge_receipts", "lock_users", "purge_tokens", "purge_verifications")
        *_, (tokens,), (verifications,) = await self._database.commit(
            *((_QUERIES[name], params) for name in statements)
        )
        return pb.PurgeUserResponse(
            one_time_tokens_count=tokens["purged"], email_verifications_count=verifications["purged"]
        )

    async def UnlockSubject(self, request: pb.UnlockSubjectRequest, context: Context) -> pb.UnlockSubjectResponse:
        """Forget wrong codes."""
        del context
        fields = Fields()
        user_id = fields.identifier("user_id", request.user_id)
        match request.WhichOneof("purpose"):
            case "token_type":
                purpose = fields.token_type("token_type", request.token_type)
            case "email_verification":
                purpose = EMAIL_VERIFICATION
            case _:
                purpose = ""
                fields.refuse("purpose", "token_type or email_verification is required")
        fields.done()

        about(current_call.get(), user_id=user_id, purpose=purpose)
        return pb.UnlockSubjectResponse(forgotten_failures_count=await unlock(self._database, user_id, purpose))


async def unlock(database: Database, user_id: UUID, purpose: str) -> int:
    """Forget the wrong codes of a user and purpose, and the sends but for the newest.

    Returns:
        How many wrong codes in a row there were.

    Raises:
        DatabaseUnavailable: Nothing happened.
    """
    params: Params = {"user_ids": [user_id], "purposes": [purpose]}
    (rows,) = await database.commit((_QUERIES["unlock_subjects"], params))
    return int(rows[0]["failures_in_a_row"]) if rows else 0

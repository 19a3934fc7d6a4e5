"""What the benchmarks hold `onetime serve` against, each in a process of its own: `tests/bench.py` starts them.

    bench_server.py empty serve ...    `onetime serve`, whose rpcs answer at once: what gRPC, interceptors, log and
                                       metrics cost without any work
    bench_server.py single serve ...   `onetime serve`, which decides each call on its own, in a transaction of its own
                                       that goes on to its end although the caller hangs up, as it does in a set
    bench_server.py argon2 2 5         Argon2 alone, in two threads for five seconds

It changes as little of the service as it can, and measures nothing of it.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import argon2  # noqa: TID251 - the bare library is what is measured
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott

from service import cli
from service.call import about, current_call
from service.config import Settings
from service.db import leave_unheard
from service.email_verification import EmailVerifications
from service.one_time_tokens import OneTimeTokens
from service.sets import Sets

_ID: Final = "7d4f0f6a-3c1e-4b7e-9a55-0d2f6c1b8e21"
_TIME: Final = Timestamp(seconds=1_800_000_000, nanos=123_456_000)

Servicer = Callable[[object, Message, object], Awaitable[Message]]


def main() -> None:
    """Do what the first argument names, with those that follow it."""
    kind = sys.argv.pop(1)
    if kind == "argon2":
        hash_for(int(sys.argv[1]), float(sys.argv[2]))
        return
    {"empty": answer_at_once, "single": decide_alone}[kind]()
    cli.main()


def answer_at_once() -> None:
    """Let the rpcs that are measured answer with a constant, of the shape that their answers have."""
    token = ott.OneTimeToken(
        id=_ID,
        user_id=_ID,
        token_type=ott.TOKEN_TYPE_RECOVERY,
        relates_to=f"{_ID}@example.com",
        create_time=_TIME,
        update_time=_TIME,
        expire_time=_TIME,
    )
    verification = ev.EmailVerification(
        id=_ID,
        user_id=_ID,
        state=ev.STATE_PENDING,
        attempts_remaining=5,
        create_time=_TIME,
        update_time=_TIME,
        expire_time=_TIME,
    )
    subject = {"user_id": _ID, "token_id": _ID, "token_type": "recovery_token"}
    _answer(OneTimeTokens, "IssueToken", ott.IssueTokenResponse(token=token, secret="s" * 43), **subject)
    _answer(OneTimeTokens, "CheckToken", ott.CheckTokenResponse(token=token), **subject)
    _answer(OneTimeTokens, "ConsumeToken", ott.ConsumeTokenResponse(token=token), **subject)
    subject = {"user_id": _ID, "verification_id": _ID}
    started = ev.StartEmailVerificationResponse(
        verification=verification, email_verification_token="t" * 128, code="123456"
    )
    _answer(EmailVerifications, "StartEmailVerification", started, **subject)
    _answer(EmailVerifications, "VerifyCode", ev.VerifyCodeResponse(verification=verification), **subject)
    found = ev.GetEmailVerificationResponse(verification=verification)
    _answer(EmailVerifications, "GetEmailVerification", found, **subject)


def _answer(servicer: type, method: str, response: Message, **subject: str) -> None:
    async def answer(self: object, request: Message, context: object) -> Message:
        del self, request, context
        about(current_call.get(), **subject)  # its line in the log is as long
        return response

    setattr(servicer, method, answer)


def decide_alone() -> None:
    """Let each call be decided at once, as many at a time as there are connections: the pool makes the others wait."""

    async def run(self: Any, element: object) -> object:  # noqa: ANN401 - its attributes are not for others
        async def decide() -> object:
            (outcome,) = await self._decide([element])
            if isinstance(outcome, Exception):
                raise outcome
            result: object = outcome
            return result

        work = asyncio.create_task(decide())
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            leave_unheard(work, decides=self._decides)
            raise

    Sets.run = run  # type: ignore[method-assign, assignment] # which is the point


def hash_for(threads: int, seconds: float) -> None:
    """Check codes against one hash for a time, and print how many a second it were."""
    cost = {
        name: Settings.model_fields[f"argon2_{name}"].default for name in ("memory_kib", "time_cost", "parallelism")
    }
    hasher = argon2.PasswordHasher(
        time_cost=cost["time_cost"], memory_cost=cost["memory_kib"], parallelism=cost["parallelism"]
    )
    stored = hasher.hash(bytes(32))
    begin = time.monotonic()

    def check(_: int) -> int:
        done = 0
        while time.monotonic() < begin + seconds:
            hasher.verify(stored, bytes(32))
            done += 1
        return done

    with ThreadPoolExecutor(threads) as executor:
        done = sum(executor.map(check, range(threads)))
    # The last ones end after the time is over.
    print(json.dumps({"throughput": done / (time.monotonic() - begin)}))  # noqa: T201 - for `tests/bench.py`


if __name__ == "__main__":
    main()

"""Session of the S3 library in which Amazon's descriptions of the service are loaded.

Loading them takes most of the processor time of a small download. They are loaded when this module is imported, in the
process from which the children that download are forked; nothing is sent. A child has one set of credentials, which the
session does not contain.
"""

from __future__ import annotations

import asyncio

from aiobotocore.session import AioSession  # type: ignore[import-untyped]


async def _load(session: AioSession) -> None:
    placeholder = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    async with session.create_client("s3", region_name="us-east-1", **placeholder):
        pass


def _loaded() -> AioSession:
    session = AioSession()
    asyncio.run(_load(session))
    return session


SESSION = _loaded()

"""`snakemake` that asks every second how its jobs are: the plugin for Slurm waits ten seconds longer each time."""

import asyncio

from snakemake.cli import main  # type: ignore[import-untyped]
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor  # type: ignore[import-untyped]


async def _a_second(executor: RemoteExecutor) -> None:
    await asyncio.sleep(1)


if __name__ == "__main__":
    RemoteExecutor.sleep = _a_second
    main()

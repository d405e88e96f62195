"""Two ranks without a launcher, as on two machines: nothing but an error ends the other rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests import forked


@contextmanager
def two_ranks(folder: Path, target: Callable[..., Any], *arguments: Any) -> Iterator[list[BaseProcess]]:
    """Call a function on two ranks, which write what they print to log_0, log_0.err, log_1 and log_1.err in the folder.

    They meet at a store of this process, as they would at torchrun's, so that no other process can take its port.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = [
        forked.start(target, *arguments, log=folder / f"log_{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank in (0, 1)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()

"""Real processes over gloo, which run functions of a test and stay for the next one."""

import multiprocessing
import os
import traceback
from datetime import timedelta


class Ranks:
    """``count`` processes of one group; :meth:`run` makes a call in each of them."""

    def __init__(self, count):
        self.count = count
        self.processes = []

    def start(self):
        context = multiprocessing.get_context("spawn")
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, there), daemon=True)
            process.start()
            self.processes.append((process, here))
        # The first one takes a port that is free.
        port = self.processes[0][1].recv()
        for _, pipe in self.processes[1:]:
            pipe.send(port)

    def stop(self):
        for process, pipe in self.processes:
            process.kill()
            process.join()
            pipe.close()
        self.processes = []

    def run(self, call, *args, seconds=120, **kwargs):
        """What ``call``, a function of an importable module, returns on each rank.

        If it raises, or does not end in time, the processes are ended and the test fails.
        """
        if not self.processes:
            self.start()
            # The first call waits for the imports.
            seconds += 60
        for _, pipe in self.processes:
            pipe.send((call, args, kwargs))
        found, failures = [], []
        for rank, (_, pipe) in enumerate(self.processes):
            if not pipe.poll(seconds):
                failures.append(f"rank {rank} did not answer within {seconds} s")
                continue
            try:
                result, failure = pipe.recv()
            except EOFError:
                result, failure = None, "the process ended"
            found.append(result)
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return found


def _serve(rank, count, pipe):
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    port = 0 if rank == 0 else pipe.recv()
    store = dist.TCPStore("127.0.0.1", port, count, rank == 0, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
    while True:
        try:
            call, args, kwargs = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (call(*args, **kwargs), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        pipe.send(answer)

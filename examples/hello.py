"""pycomm in thirty lines. Run it on two ranks: pycomm run -n 2 examples/hello.py"""

import numpy as np

import pycomm

comm = pycomm.init()  # finds its world: pycomm run, torchrun, mpirun or srun; alone, a world of 1
rank, size = comm.rank, comm.size

x = np.full(4, rank + 1, np.float32)
comm.all_reduce(x)  # in place, sum
assert (x == size * (size + 1) / 2).all()

mean = np.empty_like(x)
comm.all_reduce(np.full(4, rank, np.float32), op="avg", out=mean)  # the input stays as it is
assert (mean == (size - 1) / 2).all()

ranks = comm.all_gather(np.array([rank]))  # one rank's part after the other, along axis 0
assert list(ranks) == list(range(size))

work = comm.all_reduce(x, op="max", async_op=True)  # runs while this rank computes something else
squares = np.arange(1000) ** 2
work.wait()

with pycomm.shared_arrays():  # large arrays made in here: the other ranks read them in place, no copies
    gradients = np.full(1 << 20, rank, np.float32)
comm.all_reduce(gradients, op="avg")
assert (gradients == (size - 1) / 2).all()

evens_or_odds = comm.split(rank % 2)  # ranks of one colour are a group of their own
members = evens_or_odds.all_gather(np.array([rank]))

print(f"rank {rank} of {size}: x = {x}, gradients = {gradients[:2]}, my group = {members}")
comm.close()

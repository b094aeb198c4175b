"""The names of `import pycomm`, apart from it, so that what needs none of them starts without NumPy and the
compiled module: the launcher above all."""

from pycomm import codecs as codecs
from pycomm import trace as trace
from pycomm._native import AbortedError as AbortedError
from pycomm._native import CommError as CommError
from pycomm._native import CommTimeoutError as CommTimeoutError
from pycomm._native import MismatchError as MismatchError
from pycomm._native import PeerLostError as PeerLostError
from pycomm._native import PersistentOp as PersistentOp
from pycomm._native import Work as Work
from pycomm._native import version as __version__  # noqa: F401
from pycomm.algorithm import Algorithm as Algorithm
from pycomm.bucket import Bucket as Bucket
from pycomm.group import Communicator as Communicator
from pycomm.group import init as init
from pycomm.group import premul_sum as premul_sum
from pycomm.group import run_local as run_local
from pycomm.reducer import GradientReducer as GradientReducer
from pycomm.sharing import shared_arrays as shared_arrays
from pycomm.stats import Stats as Stats

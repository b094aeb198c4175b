"""Averages of gradients, sent while the others are still being computed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np

from pycomm import _native, checks, trace
from pycomm.arrangement import Arrangement, Gradient
from pycomm.bucket import checked_names, refuse_twice, separate
from pycomm.codecs.feedback import ErrorFeedback
from pycomm.codecs.kinds import Codec, feedback_of
from pycomm.codecs.powersgd import PowerSGD, chosen
from pycomm.flights import ByPriority, Flights, InOrder
from pycomm.gradients import is_tensor
from pycomm.group import Communicator
from pycomm.stats import Stats

_MIB = 1 << 20
_SHOWN = 3  # names in a message


class _Step:
    """What has become of the gradients in one step."""

    flights: Flights

    def __init__(self, arrangement: Arrangement) -> None:
        count = len(arrangement.order)
        self.arrangement = arrangement
        self.ready: list[int] = []  # in the order in which they became ready
        self.is_ready = [False] * count
        self.is_used = np.zeros(count, np.int64)
        self.missing = [len(members) for members in arrangement.members]  # of each bucket
        self.active: int | None = None  # ranks with input; None: not known yet
        self.scale = 1.0  # makes averages over all ranks those over the active ones
        self.scale_sent = 1.0  # the same, of gradients that residuals are added to, which it is not for
        self.works: list[Any] = []
        self.loss_scale = 1.0
        self.owed: dict[int, Any] = {}  # before the step, of parameters that this rank has not used
        self.times: trace.Step | None = None  # if the group is traced


class GradientReducer:
    """Averages a model's gradients over the ranks of `comm` while backward() computes the others.

    Gradients lie in buckets. ready(i) says that gradient i is final; a bucket is sent when all of its
    gradients are, and finish() waits for the averages, which have the same bits on all ranks. (Li et al.,
    PyTorch Distributed: experiences on accelerating data parallel training, VLDB 2020.)

    `gradients`, in the same order on all ranks, of float32, float16, bfloat16 or float8: a torch parameter,
    which stands for its `.grad`; an array or tensor, which is itself the gradient; or a shape, for which the
    reducer makes an array (see `gradients`). `names`: their names, in errors and for error feedback; "0",
    "1", ... by default. `dtype`: the element type in which gradients cross, by default their own.

    `bucket_mb`: MiB of a bucket; the first one of a step has 1 MiB, so that communication begins early.
    `order`: "reverse" fills and sends buckets from the last gradient to the first, as backward() computes
    them. "ready" does so in the first step, and from then on in the order in which gradients became ready on
    rank 0 (where gradients are shapes their arrays stay, and with them the buckets). "priority" sends one
    bucket at a time: of those that wait, the one of the first gradients, which the next forward pass needs
    first.

    `codec`: as in all_reduce, or "powersgd" or a codecs.PowerSGD, which makes a bucket's second call when the
    next bucket is sent, or in finish(). `error_feedback` takes the place of the codec's own. finish() undoes
    the residuals' changes in a step that is not finite; with `lag` only in its buckets that are not, since
    later steps have built on the others. By default residuals belong to this reducer (see `error_feedback`).
    Reducers share an ErrorFeedback or a PowerSGD only if their gradients have different names.

    `gradient_as_bucket_view`: after finish(), parameters' `.grad` are views of the buckets, so that gradients
    that backward() adds there are not copied: zero them by zero_grad(), or torch's with set_to_none=False.
    Otherwise, and always with `lag`, gradients are copied to the buckets and back.

    `find_unused`: gradients that no pass of a step has made ready are unused() at finish(), not an error. A
    parameter that no rank has used has no `.grad` after finish(), so that the optimizer leaves it alone; an
    array or tensor then holds zeros, or what error feedback has paid of its residual.
    `uneven_inputs`: ranks may make different numbers of steps (see join). `lag`: see finish().

    To make one is a collective call: ValueError, on all ranks, if their gradients differ. Not thread-safe.
    Between the first ready() of a step and finish(), the reducer makes calls of `comm`; ranks that make calls
    of their own there must make them between the same buckets, or get a MismatchError that names both calls;
    with order="priority" they make none, since buckets are then sent at any time.
    """

    def __init__(
        self,
        gradients: Iterable[Any],
        comm: Communicator,
        *,
        names: Iterable[str] | None = None,
        bucket_mb: float = 25.0,
        dtype: Any = None,
        codec: Codec | PowerSGD | str | None = None,
        error_feedback: ErrorFeedback | bool | None = None,
        order: Literal["ready", "reverse", "priority"] = "ready",
        gradient_as_bucket_view: bool = True,
        find_unused: bool = False,
        uneven_inputs: bool = False,
        lag: int = 0,
    ) -> None:
        if not isinstance(comm, Communicator):
            raise TypeError(f"`comm` is {checks.shown(comm)}: pass a pycomm.Communicator")
        if order not in ("ready", "reverse", "priority"):
            raise ValueError(f'`order` is {order!r}: pass "ready", "reverse" or "priority"')
        bucket_bytes = checks.number(bucket_mb, "bucket_mb") * _MIB
        if not bucket_bytes > 0:
            raise ValueError(f"`bucket_mb` is {bucket_mb!r}: pass a positive number of MiB")
        self._lag = checks.integer(lag, "lag")
        if self._lag < 0:
            raise ValueError(f"`lag` is {lag}: pass 0, or how many steps old the averages may be")
        given = separate(gradients, "gradients")
        if not given:
            raise ValueError("`gradients` is empty: pass parameters, arrays or shapes")
        found = checked_names(names, len(given))
        refuse_twice(given, found)
        self._gradients = [Gradient(x, name, dtype) for x, name in zip(given, found, strict=True)]
        self._comm = comm
        self._options: dict[str, Any] = {}
        self._feedback: ErrorFeedback | None = None
        self._powersgd: PowerSGD | None = None
        if codec is not None:
            _refuse_float8(self._gradients, dtype)
            used = chosen(codec, error_feedback, comm)
            if isinstance(used, PowerSGD):
                if order == "priority":
                    raise ValueError(
                        'order="priority" with powersgd, whose buckets fly twice: pass "ready" or "reverse"'
                    )
                self._powersgd = used
                self._feedback = used.error_feedback
            else:
                self._options["codec"] = used
                self._feedback = feedback_of(used, comm)
        elif error_feedback is not None:
            raise ValueError(f"error_feedback={error_feedback!r} without `codec`: nothing is lost")
        self._by_priority = order == "priority"
        self._find_unused = bool(find_unused)
        self._uneven = bool(uneven_inputs)
        self._layout = {
            "comm": comm,
            "dtype": dtype,
            "bucket_bytes": bucket_bytes,
            "as_views": bool(gradient_as_bucket_view) and self._lag == 0,
        }
        self._rearranges = order == "ready" and not any(g.of_shape for g in self._gradients)
        self._hooks: list[Any] = []
        self._synchronises = True
        self._added: set[int] = set()  # gradients that became ready inside no_sync() in this step
        self._failure: Exception | None = None  # of the group
        self._steps = 0
        self._in_flight: deque[_Step] = deque()  # sent and not taken, the oldest first
        self._arrange(list(reversed(range(len(given)))))
        for keeper in (self._powersgd, self._feedback):
            if keeper is not None:
                _claim(keeper, self, found)

    # ---- a step ----

    @property
    def gradients(self) -> Sequence[Any]:
        """What was given; for a shape the array to write that gradient to, zero at first."""
        return tuple(g.given for g in self._gradients)

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """What keeps the codec's residuals, for checkpoints; None without error feedback."""
        return self._feedback

    @property
    def buckets(self) -> Sequence[Sequence[int]]:
        """Which gradients are in which bucket, in the order in which buckets are sent."""
        return tuple(tuple(members) for members in self._step.arrangement.members)

    def ready(self, i: int) -> None:
        """Gradient `i` is final. Inside no_sync() it is not yet: a later pass may add to it.

        Raises IndexError; ValueError if it was ready before in this step.
        """
        if self._synchronises:
            self._mark(i, used=True)
        else:
            self._added.add(self._checked(i))

    def unused(self, i: int) -> None:
        """Gradient `i` takes no part in this step on this rank: its bucket does not wait for it, and it
        counts as zeros."""
        if self._synchronises:
            self._mark(i, used=False)

    def finish(self) -> Stats | None:
        """Ends a step: waits for its averages, and leaves them in the gradients.

        Returns the Stats of the averages, all gradients together: `norm`, for example, to clip by, and
        `finite`. Raises ValueError, and sends nothing more, if gradients are not ready; then call ready() or
        unused() for these, and finish() again.

        With lag=k the averages are those of k steps ago, so that they have k steps to cross in; the first k
        calls return None and leave the gradients as they are: take no optimizer step after these. After the
        last step drain() brings the rest. (Stale synchronous parallel: Ho et al., More effective distributed
        ML via a stale synchronous parallel parameter server, NIPS 2013.)
        """
        if not self._synchronises:
            raise ValueError("finish() inside no_sync(): call it after the last pass of a step, outside")
        if self._failure is not None:
            self._raise_failure()
        if self._step.times is not None:
            self._step.times.stops()
        for i in sorted(self._added):  # in passes before the last one, which has not used these
            if not self._step.is_ready[i]:
                self._mark(i, used=True)
        missing = [i for i, is_ready in enumerate(self._step.is_ready) if not is_ready]
        if missing and not self._find_unused:
            raise ValueError(
                f"not ready: {self._shown(missing)}; call ready() or unused() for each gradient of a step"
                " (attach() lets backward() call ready() of torch parameters), or make the GradientReducer"
                " with find_unused=True"
            )
        for i in missing:
            self._mark(i, used=False)
        try:
            return self._finish()
        except _native.CommError as error:
            self._fail(error)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """For all backward passes of a step but the last: gradients add up, and nothing is sent."""
        if self._step.ready:
            raise ValueError("no_sync() after ready(): enter it before the first pass of a step")
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before

    def join(self) -> Iterator[Stats | None]:
        """After this rank's last step, with uneven_inputs: takes part in the steps of the other ranks with
        gradients that count as nothing. Yields what finish() returns in each of these steps; take the
        optimizer step there as well, so that the replicas stay equal.

        Averages are over the ranks that have input left; what error feedback owes is that of all ranks. The
        first ready() of a step tells the others that this rank has, in a call of its own.
        """
        if not self._uneven:
            raise ValueError("join() without uneven_inputs: make the GradientReducer with it, on all ranks")
        while self._count_active(has_input=False):
            for i in self._step.arrangement.order:
                self._mark(i, used=False)
            yield self.finish()

    def drain(self) -> Iterator[Stats]:
        """With lag=k, after the last step: yields the Stats of the averages that are left, the oldest first,
        each when they are in the gradients."""
        while self._in_flight:
            yield self._take()

    def zero_grad(self) -> None:
        """Sets all gradients to zero, in place; parameters without a gradient keep none."""
        for gradient in self._gradients:
            gradient.zero()

    # ---- torch ----

    def attach(self) -> None:
        """Lets backward() call ready(), by hooks on the parameters, until detach(). ValueError if not all
        gradients are those of torch parameters."""
        if self._hooks:
            raise ValueError("attach() a second time: call detach() before")
        others = [i for i, gradient in enumerate(self._gradients) if not gradient.of_parameter]
        if others:
            raise ValueError(f"no torch parameter: {self._shown(others)}; call ready() for these gradients")
        for i, gradient in enumerate(self._gradients):
            hook = partial(_after_backward, weakref.ref(self), i)
            self._hooks.append(gradient.given.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Takes the hooks of attach() off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs besides model, optimizer and error feedback, equal on all ranks: the number
        of steps, the order of the gradients, and with lag the averages that are not taken yet, for which it
        waits. Call it between steps."""
        self._refuse_open_step("state_dict")
        for step in self._in_flight:
            for work in step.works:
                work.wait()
        state = {
            "steps": self._steps,
            "order": list(self._step.arrangement.order),
            "rearranges": self._rearranges,
            "in_flight": [
                {
                    "order": list(step.arrangement.order),
                    "is_used": step.is_used.tolist(),
                    "scale": step.scale,
                    "loss_scale": step.loss_scale,
                    "buckets": [_copied(bucket.data) for bucket in step.arrangement.buckets],
                }
                for step in self._in_flight
            ],
        }
        if self._powersgd is not None:
            state["factors"] = self._powersgd.factors
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where state_dict() was called, on any number of ranks. A collective call, on a reducer that
        was made alike and has made no step; ValueError otherwise."""
        self._refuse_open_step("load_state_dict")
        if self._steps:
            raise ValueError("load_state_dict() after a step: load into a new GradientReducer")
        keys = {"steps", "order", "rearranges", "in_flight"}
        if not isinstance(state, Mapping) or not keys <= state.keys():
            raise ValueError("`state` is not a GradientReducer's: pass what its state_dict() has returned")
        order = [int(i) for i in state["order"]]
        if sorted(order) != list(range(len(self._gradients))):
            raise ValueError(
                f"the state is that of {len(order)} gradients, and there are {len(self._gradients)} here"
            )
        if len(state["in_flight"]) > self._lag:
            raise ValueError(
                f"the state holds averages of {len(state['in_flight'])} steps, and lag={self._lag} here: make"
                " the GradientReducer with the lag that it had"
            )
        in_flight = [self._restored(saved) for saved in state["in_flight"]]
        if self._powersgd is not None:
            self._powersgd.load_factors(state.get("factors", {}))
        self._steps = int(state["steps"])
        self._arrange(order)
        self._in_flight.extend(in_flight)
        self._rearranges = bool(state["rearranges"])

    def _restored(self, saved: Mapping[str, Any]) -> _Step:
        """A step whose averages have arrived. Its order may be that from before the rearrangement."""
        arrangement = Arrangement(self._gradients, saved["order"], **self._layout)
        places = [bucket.data for bucket in arrangement.buckets]
        if [(len(x), x.dtype) for x in saved["buckets"]] != [(len(x), x.dtype) for x in places]:
            raise ValueError("the state has other buckets: make the GradientReducer as it was made then")
        for place, averages in zip(places, saved["buckets"], strict=True):
            place[:] = averages
        step = self._step_in(arrangement)
        step.is_used[:] = saved["is_used"]
        step.scale = float(saved["scale"])
        step.loss_scale = float(saved.get("loss_scale", 1.0))
        return step

    def _refuse_open_step(self, method: str) -> None:
        if self._step.ready:
            raise ValueError(f"{method}() between ready() and finish(): call it between steps")

    # ---- inside ----

    def _checked(self, i: int) -> int:
        i = checks.integer(i, "i")
        if not 0 <= i < len(self._gradients):
            raise IndexError(f"`i` is {i}: there are {len(self._gradients)} gradients")
        return i

    def _mark(self, i: int, used: bool) -> None:
        step = self._step
        times = step.times
        if times is not None:
            times.stops()
        i = self._checked(i)
        gradient = self._gradients[i]
        if self._failure is not None:
            self._raise_failure()
        if step.is_ready[i]:
            raise ValueError(
                f"gradient {gradient.name!r} is ready a second time: call finish() before the next step, also"
                " after a pass that failed (unused() for what it has not reached), and no_sync() for all"
                " passes of a step but the last"
            )
        if used:
            gradient.require()
        else:
            gradient.leave_out()
            if gradient.of_parameter and self._find_unused and self._feedback is not None and self._lag == 0:
                step.owed[i] = self._feedback.owed(gradient.name)
        try:
            if not step.active:
                self._count_active(has_input=True)
            bucket = step.arrangement.bucket_of[i]
            if step.missing[bucket] == 1:
                if times is not None:
                    times.bucket_ready(bucket, step.arrangement.buckets[bucket].__pycomm_signature__)
                step.arrangement.pack(bucket, step.scale_sent)
            step.is_ready[i] = True
            step.ready.append(i)
            step.is_used[i] = used
            step.missing[bucket] -= 1
            if step.missing[bucket] == 0:
                step.flights.packed(bucket)
        except _native.CommError as error:
            self._fail(error)
        if times is not None:
            times.goes_on()

    def _fail(self, error: _native.CommError) -> NoReturn:
        """Raises what ended the group: an earlier call may have met it, and this one only heard of it."""
        self._failure = error
        for step in (*self._in_flight, self._step):
            for work in step.flights.works:
                try:
                    work.wait()
                except _native.CommError as met:
                    if isinstance(self._failure, _native.AbortedError):
                        self._failure = met
        raise self._failure

    def _raise_failure(self) -> NoReturn:
        raise _native.AbortedError(
            f"the reducer's group has failed before: {self._failure} Make another GradientReducer, of the"
            " group that comm.shrink() returns or of a new one."
        )

    def _count_active(self, has_input: bool) -> int:
        active = self._comm.size
        if self._uneven:
            count = np.array([has_input], np.int64)
            active = int(self._comm.all_reduce(count, tag="GradientReducer: ranks with input")[0])
        self._step.active = active
        scale = self._comm.size / max(active, 1)
        if self._feedback is None:
            self._step.scale = scale
        else:
            self._step.scale_sent = scale
        return active

    def _finish(self) -> Stats | None:
        step = self._step
        step.flights.send_all()
        if self._powersgd is not None:
            self._powersgd.turn()
        if self._feedback is not None:
            step.loss_scale = self._feedback.scale
        step.works = list(step.flights.works)
        if self._find_unused:
            used = self._comm.all_reduce(step.is_used, tag="GradientReducer: ranks that used", async_op=True)
            step.works.append(used)
        self._in_flight.append(step)
        self._steps += 1
        self._added.clear()
        stats = self._take(step.times) if len(self._in_flight) > self._lag else None
        if self._rearranges:
            self._rearranges = False
            order = np.array(step.ready, np.int64)
            self._comm.broadcast(order, root=0, tag="GradientReducer: order")
            self._arrange(order.tolist())
        else:
            self._begin()
        if step.times is not None:
            step.times.end_step()
        if (traced := trace.active(self._comm)) is not None:
            self._step.times = traced.begin_step(self._step.arrangement.buckets[0].__pycomm_signature__)
        return stats

    def _take(self, times: trace.Step | None = None) -> Stats:
        step = self._in_flight.popleft()
        for work in step.works:
            work.wait()
        if times is not None and self._lag:
            times.goes_on()  # what only a trace needs is no communication
            times.cosine = step.arrangement.cosine()
            times.stops()
        stats = step.arrangement.take(step.scale)
        if self._find_unused:
            for i in np.flatnonzero(step.is_used == 0):
                self._gradients[i].forget()
        if self._feedback is not None and self._lag == 0:
            if not stats.finite:
                self._feedback.skip()
            elif self._find_unused:  # what was paid to a parameter that nobody used is still owed
                for of, owed in step.owed.items():
                    if step.is_used[of] == 0:
                        self._feedback.owe(self._gradients[of].name, owed)
        elif self._feedback is not None and self._find_unused:  # later steps have built on what was owed
            for of in np.flatnonzero(step.is_used == 0).tolist():
                if self._gradients[of].of_parameter and step.arrangement.is_finite(of):
                    average = step.arrangement.average(of)
                    self._feedback.owe_more(self._gradients[of].name, average, step.loss_scale)
        if step.arrangement.order == self._order:
            self._spare.append(step.arrangement)
        return stats

    def _arrange(self, order: list[int]) -> None:
        self._order = order
        self._spare: list[Arrangement] = []  # in which no step is
        self._begin()

    def _begin(self) -> None:
        arrangement = (
            self._spare.pop() if self._spare else Arrangement(self._gradients, self._order, **self._layout)
        )
        self._step = self._step_in(arrangement)

    def _step_in(self, arrangement: Arrangement) -> _Step:
        options = self._options | {"step": self._steps} if self._options else {}
        step = _Step(arrangement)
        send = partial(_send, self._comm, arrangement, options, self._powersgd, weakref.ref(step))
        if self._by_priority:
            step.flights = ByPriority(send, [min(members) for members in arrangement.members], self._comm)
        else:
            step.flights = InOrder(send, len(arrangement.buckets))
        return step

    def _shown(self, indices: list[int]) -> str:
        shown = ", ".join(repr(self._gradients[i].name) for i in indices[:_SHOWN])
        return shown + (f" (and {len(indices) - _SHOWN} more)" if len(indices) > _SHOWN else "")


def _after_backward(reducer: weakref.ref[GradientReducer], i: int, _: Any) -> None:
    """A hook, which ends with its reducer: it does not keep one alive that its owner has dropped, and leaves
    the parameters of one whose group has failed to the next."""
    found = reducer()
    if found is not None and found._failure is None:
        found.ready(i)


def _send(
    comm: Communicator,
    arrangement: Arrangement,
    options: Mapping[str, Any],
    powersgd: PowerSGD | None,
    of_step: weakref.ref[_Step],
    bucket: int,
) -> Any:
    """Refers to its step weakly, and not to the reducer: neither becomes a cycle of references, whose end
    would wait for the garbage collector."""
    step = of_step()
    if step is not None and step.times is not None:
        step.times.bucket_sent(bucket)
    of = arrangement.buckets[bucket]
    if powersgd is not None and powersgd.compressed(of.names, of.views):
        return powersgd.begin(of.views, comm, of.names)
    return comm.all_reduce(of, op="avg", async_op=True, **options)


# Who uses an ErrorFeedback or a PowerSGD, for gradients of these names.
_claims: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[GradientReducer, set[str]]]
_claims = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _claim(keeper: ErrorFeedback | PowerSGD, reducer: GradientReducer, names: Sequence[str]) -> None:
    """Raises ValueError if another reducer keeps residuals or factors under one of these names there."""
    with _lock:
        claims = _claims.setdefault(keeper, weakref.WeakKeyDictionary())
        for other, others in claims.items():
            if other._comm is reducer._comm and not others.isdisjoint(names):
                raise ValueError(
                    f"another GradientReducer uses this {type(keeper).__name__}, also for a gradient named"
                    f" {min(others.intersection(names))!r}: make one for each, or pass other names, or drop"
                    " the other reducer first"
                )
        claims[reducer] = set(names)


def _copied(data: Any) -> Any:
    return data.clone() if is_tensor(data) else data.copy()


def _refuse_float8(gradients: Sequence[Gradient], dtype: Any) -> None:
    for gradient in gradients:
        sent = _native.describe_buffer(gradient.given, "gradients", False).dtype if dtype is None else dtype
        name, _ = _native.packable_dtype(sent)
        if name.startswith("float8"):
            raise TypeError(
                f"gradient {gradient.name!r} crosses as {name}, which no codec takes: pass another dtype, or"
                " leave codec out"
            )

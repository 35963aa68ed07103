"""The one thread that owns the model: tickets in, events out, one device call after another.

Two rules keep every reader from waiting for ever: `_open` holds every accepted ticket that has not ended, and `_send`,
which alone takes tickets out, sends the last event of each that it takes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from lserve_jax.config.errors import InputError
from lserve_jax.config.sampling import SamplingParams
from lserve_jax.engine.generation import Generation
from lserve_jax.engine.progress import Progress
from lserve_jax.engine.request import Sequence as EngineSequence
from lserve_jax.llm import LLM
from lserve_jax.serve.errors import DeadlinePassed, EngineFailed, NotReady, QueueFull
from lserve_jax.serve.metrics import Metrics
from lserve_jax.serve.options import ServeOptions
from lserve_jax.serve.ticket import Event, Failed, Finished, PromptProgress, Ticket, send

logger = logging.getLogger("lserve_jax")

MOST_FAILURES = 3
"""Device calls that may fail one after another; then the device is given up."""

_GOODBYE_S = 5.0
"""How long `stop` waits for the thread, which may be in a device call."""


class Cancelled(Exception):  # noqa: N818 - it is no fault
    """What a cancelled ticket fails with; its reader has gone."""


@dataclass(frozen=True)
class Health:
    """What the engine can do.

    Attributes:
      status: "loading" (it compiles), "ready", "draining" (it ends), "stuck" (a device call takes too long) or "dead".
      detail: one line for people; empty if there is nothing to say.
    """

    status: str
    detail: str = ""


@dataclass(eq=False)
class _Open:
    """An accepted ticket that has not ended.

    Attributes:
      ticket: the ticket.
      deadline: time at which it is ended; None if it may take any time.
      sequence: its sequence in the engine; None until the thread has opened it.
      started_at: time of its first call; None while it waits.
      told_at: time of its newest tokens; None before the first.
    """

    ticket: Ticket
    deadline: float | None
    sequence: EngineSequence | None = None
    started_at: float | None = None
    told_at: float | None = None

    @property
    def id(self) -> int:
        """Returns the id of the request."""
        return self.generation.request.id

    @property
    def generation(self) -> Generation:
        """Returns the request in the engine."""
        return self.ticket.generation

    @property
    def prompt_tokens(self) -> int:
        """Returns how many tokens its prompt has."""
        return len(self.generation.request.prompt)


class EngineThread:
    """Runs the requests of all readers in one thread; every method may be called from any thread.

    Attributes:
      llm: the model. Others may make requests with it and use its tokenizer, but run nothing.
      metrics: what is counted.
    """

    def __init__(
        self,
        llm: LLM,
        options: ServeOptions,
        metrics: Metrics | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Creates the thread; `start` starts it.

        Args:
          llm: the model.
          options: limits of the queue and of times.
          metrics: where to count; None makes new ones.
          clock: the clock of the arrival of requests and of deadlines.
        """
        self.llm = llm
        self.metrics = metrics or Metrics(options.metrics_prefix)
        self._options = options
        self._clock = clock
        self._lock = threading.RLock()
        self._has_ended_some = threading.Condition(self._lock)
        self._open: dict[int, _Open] = {}  # by id of the request, in order of arrival
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._status = Health("loading", "programs are being compiled")
        self._error: BaseException | None = None
        self._is_warm = threading.Event()
        self._is_stopping = False
        self._busy_since: float | None = None  # begin of the current turn; None while nothing is open
        self._num_failures = 0
        self._usual_seconds = 1.0  # of a request with a slot
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread: it compiles every program, then `health` is "ready"."""
        self._thread.start()

    def wait_until_warm(self) -> None:
        """Waits until the programs have been compiled, or never will be.

        Raises:
          Exception: what ended the thread.
        """
        self._is_warm.wait()
        if self._error is not None:
            raise self._error

    def health(self) -> Health:
        """Returns what the engine can do."""
        status, since, limit = self._status, self._busy_since, self._options.stuck_after
        if status.status in ("ready", "draining") and limit and since is not None:
            seconds = self._clock() - since
            if seconds > limit:
                return Health("stuck", f"a device call has taken {seconds:.0f} s so far")
        return status

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Accepts tickets, all or none; each gets its events from now on.

        Raises:
          QueueFull: if as many requests or prompt tokens wait as may.
          NotReady: if the engine takes no requests.
          InputError: if they are more than ever fit into the queue.
        """
        with self._lock:
            health = self.health()
            if health.status != "ready":
                self.metrics.refused.labels(reason=health.status).inc(len(tickets))
                raise NotReady(health.status, health.detail)
            self._require_room(tickets)
            entries = [_Open(ticket, self._deadline(ticket)) for ticket in tickets]
            self._open.update((entry.id, entry) for entry in entries)
            self._work.put(partial(self._begin, entries))

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Ends tickets before the next device call, in whatever state they are; those that have ended stay so."""
        with self._lock:
            found = [self._open.get(ticket.generation.request.id) for ticket in tickets]
        if entries := [entry for entry in found if entry is not None]:
            self._work.put(partial(self._fail, entries, Cancelled("the request was cancelled")))

    def drain(self, timeout_s: float) -> bool:
        """Refuses new tickets, lets the open ones end, and stops; returns whether all had ended in time."""
        with self._lock:
            self._refuse_more()
            has_ended_all = self._has_ended_some.wait_for(lambda: not self._open, timeout_s)
        self.stop()
        return has_ended_all

    def stop(self) -> None:
        """Ends every ticket now, and the thread after its current device call, if it has one."""
        with self._lock:
            self._refuse_more()
            entries = list(self._open.values())
            self._send([(entry, Failed(NotReady("draining", "the server is going down"))) for entry in entries])
        self._work.put(partial(self._stop, entries))
        if self._thread.ident is not None:
            self._thread.join(_GOODBYE_S)

    @property
    def is_alive(self) -> bool:
        """Returns whether the thread still runs."""
        return self._thread.is_alive()

    def _refuse_more(self) -> None:
        if self._status.status != "dead":
            self._status = Health("draining", "the server is going down")

    def _deadline(self, ticket: Ticket) -> float | None:
        """Returns when a ticket is ended: at its own deadline or after the longest time of all requests."""
        limit = self._options.request_timeout
        own = [] if ticket.deadline is None else [ticket.deadline]
        return min([*own, *([ticket.generation.request.arrival + limit] if limit else [])], default=None)

    def _require_room(self, tickets: Sequence[Ticket]) -> None:
        """Raises if too much would wait: requests with a slot, or with a free one to take, do not."""
        slots, options = self.llm.setup.sizes.max_num_seqs, self._options
        most, most_tokens = options.max_queued_requests, options.max_queued_tokens
        tokens = [len(ticket.generation.request.prompt) for ticket in tickets]
        if len(tickets) > slots + most:
            raise InputError(
                f"{len(tickets)} prompts at once, but {slots} can run and {most} wait: send fewer, or start the server "
                "with a higher --max-queued-requests"
            )
        if most_tokens is not None and sum(tokens[slots:]) > most_tokens:
            raise InputError(
                f"{len(tickets)} prompts at once, of which {sum(tokens[slots:])} tokens would have to wait and "
                f"{most_tokens} may: send fewer, or start the server with a higher --max-queued-tokens"
            )
        waiting = [entry.prompt_tokens for entry in self._open.values() if entry.started_at is None]
        num_free = max(slots - (len(self._open) - len(waiting)), 0)
        queue = [*waiting, *tokens][num_free:]
        if len(queue) > most or (most_tokens is not None and sum(queue) > most_tokens):
            self.metrics.refused.labels(reason="queue_full").inc(len(tickets))
            raise QueueFull(min(max(self._usual_seconds / slots, 1.0), 60.0))

    def _send(self, events: Iterable[tuple[_Open, Event]]) -> None:
        """Sends events to those tickets that are open; a last event takes its ticket out."""
        with self._lock:
            told = [(entry, event) for entry, event in events if entry.id in self._open]
            ends = [(entry, event) for entry, event in told if isinstance(event, Finished | Failed)]
            try:
                for entry, event in ends:  # counted before a reader can ask
                    self._note_end(entry, event)
            finally:
                send((entry.ticket, event) for entry, event in told)
                for entry, _ in ends:
                    del self._open[entry.id]
                self._has_ended_some.notify_all()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._warm_up()
            while not self._is_stopping:
                self._turn()
        except BaseException as error:  # noqa: BLE001 - no reader may wait for ever, whatever it is
            self._die(error)
        finally:
            self._busy_since = None
            self._is_warm.set()

    def _warm_up(self) -> None:
        """Compiles every program, and runs a request of one token: what `health` promises then has been seen."""
        self.llm.engine.warm_up(moves_pages=self._options.contexts is not None, on_done=self._on_compiled)
        for _ in self.llm.session.run([self.llm.request([0], SamplingParams(max_tokens=2, ignore_eos=True))]):
            pass
        with self._lock:
            self.metrics.begin(self.llm.engine.scheduler)
            if self._status.status == "loading":
                self._status = Health("ready")
        self._is_warm.set()

    def _on_compiled(self, done: int, total: int) -> None:
        said = f"{done} of {total} programs are compiled"
        logger.info(said)
        with self._lock:
            if self._status.status == "loading":
                self._status = Health("loading", said)

    def _turn(self) -> None:
        """Does what others have asked for, then makes one device call if a ticket is open; else waits."""
        if not self._open:
            self._busy_since = None
            self._set_gauges()
            self._work.get()()
        self._busy_since = self._clock()
        while not self._work.empty():
            self._work.get()()
        self._end_late()
        if self._open and not self._is_stopping:
            self._set_gauges()
            self._step()

    def _stop(self, entries: Sequence[_Open]) -> None:
        self._end(entries)
        self._is_stopping = True

    def _die(self, error: BaseException) -> None:
        """Ends the engine and every ticket."""
        if self._is_warm.is_set():  # else `wait_until_warm` raises it
            logger.error("the engine has ended", exc_info=error)
        with self._lock:
            self._error = error
            self._status = Health("dead", f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
            ended = NotReady("dead", "the engine has ended; the log of the server says why")
            self._send([(entry, Failed(ended)) for entry in self._open.values()])

    def _begin(self, entries: Sequence[_Open]) -> None:
        """Gives requests to the engine; one that it refuses fails alone."""
        for entry in entries:
            if entry.id in self._open:
                try:
                    entry.sequence = self.llm.session.open(entry.generation)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's
                    self._fail([entry], error)

    def _end_late(self) -> None:
        now = self._clock()
        late = [one for one in list(self._open.values()) if one.deadline is not None and now >= one.deadline]
        self._fail(late, DeadlinePassed())

    def _fail(self, entries: Sequence[_Open], error: Exception) -> None:
        """Ends tickets that did not finish."""
        self._end(entries)
        self._send([(entry, Failed(error)) for entry in entries])

    def _end(self, entries: Iterable[_Open]) -> None:
        """Ends requests in the engine: their pages and slots are free."""
        self.llm.session.end([entry.generation for entry in entries])

    def _step(self) -> None:
        """Makes one device call; if it fails, so do the open tickets, and the engine goes on."""
        try:
            brought = self.llm.session.step()
        except Exception as error:
            self._num_failures += 1
            self.metrics.device_failures.inc()
            logger.exception("a device call has failed, and with it every open request")
            self._fail(list(self._open.values()), EngineFailed(error))
            if self._num_failures >= MOST_FAILURES:
                raise
        else:
            self._num_failures = 0
            self._tell(brought)

    def _tell(self, brought: Sequence[Progress]) -> None:
        """Sends what a device call has brought, and ends the tickets whose requests have ended."""
        self.metrics.set_engine(self.llm.engine.scheduler)
        if brought:
            self.metrics.count_call("prefill" if brought[0].is_prefill else "decode", brought[0].seconds)
        now, by_id = self._clock(), {one.sequence.request.id: one for one in brought}
        events: list[tuple[_Open, Event]] = []
        for entry in list(self._open.values()):
            try:
                events += [(entry, event) for event in self._news(entry, by_id.get(entry.id), now)]
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this request's
                events.append((entry, Failed(error)))
        self._end(entry for entry, event in events if isinstance(event, Finished | Failed))
        self._send(events)

    def _news(self, entry: _Open, progress: Progress | None, now: float) -> Iterator[Event]:
        """Yields what a call has brought for a ticket, its end included; raises if the request failed."""
        generation = entry.generation
        if progress is not None:
            if entry.started_at is None:
                entry.started_at = now - progress.seconds
                waited = max(entry.started_at - generation.request.arrival, 0.0)
                self.metrics.count_prompt(entry.prompt_tokens, waited)
            if progress.is_prefill:
                yield PromptProgress(
                    total=entry.prompt_tokens,
                    cached=generation.cached_tokens,
                    processed=progress.sequence.num_cached,
                    seconds=now - generation.request.arrival,
                )
            chunk = generation.take_chunk()
            if chunk or chunk.token_ids:
                self._note_tokens(entry, len(chunk.token_ids), now)
                yield chunk
        if generation.error is not None:  # of its logits or its text: no fault of the client's
            logger.error("a request has failed: %s", generation.error, exc_info=generation.error)
            raise EngineFailed(generation.error)
        reason = None if entry.sequence is None else entry.sequence.finish_reason
        if reason == "abort":
            raise RuntimeError("the request was ended inside the engine")
        if reason is not None:
            if entry.ticket.on_finish is not None:
                entry.ticket.on_finish()
            yield Finished(self.llm.output(generation))

    def _note_tokens(self, entry: _Open, count: int, now: float) -> None:
        """Counts new tokens; text may come without any."""
        if count:
            since = entry.generation.request.arrival if entry.told_at is None else entry.told_at
            self.metrics.count_tokens(count, now - since, is_first=entry.told_at is None)
            entry.told_at = now

    def _note_end(self, entry: _Open, end: Finished | Failed) -> None:
        if isinstance(end, Failed):
            self.metrics.failed.labels(reason=_reason(end.error)).inc()
            return
        now = self._clock()
        self.metrics.count_finished(end.output.finish_reason, now - entry.generation.request.arrival)
        if entry.started_at is not None:
            self._usual_seconds += 0.1 * (now - entry.started_at - self._usual_seconds)

    def _set_gauges(self) -> None:
        entries, scheduler = list(self._open.values()), self.llm.engine.scheduler
        allocator = scheduler.allocator
        num_begun = sum(entry.started_at is not None for entry in entries)
        num_running = num_begun - len(scheduler.swapped)
        self.metrics.set_requests(running=num_running, waiting=len(entries) - num_begun)
        # What only the prefix cache holds is there for whoever needs it.
        free = {name: (pool.num_free + pool.num_evictable, pool.num_pages) for name, pool in allocator.pools}
        self.metrics.set_pools(free)
        self.metrics.set_engine(scheduler)


def _reason(error: Exception) -> str:
    """Returns the label of a failure."""
    kinds = {Cancelled: "cancelled", DeadlinePassed: "timeout", InputError: "input", NotReady: "ended"}
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")

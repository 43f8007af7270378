"""Generate answers to prompts, as token ids, with a key-value cache and continuous batching.

A row of the batch is one prompt and its answer. First the model reads the prompt, in pieces of at
most PREFILL tokens. Each later step writes one token in every row. Rows have their own lengths and
do not influence each other, so an answer does not depend on the other rows. When an answer ends,
the next waiting prompt gets its row. So a long answer does not delay short answers.

On a GPU a step is one CUDA graph, which computes the next token of each row from its last token.
Positions, sampling and the end check are computed on the device, so a step never waits for the
host. The host reads the tokens of one step while the GPU runs the next step. A graph serves one
batch size and one choice of sampling features (`Needs`). The first step with a new batch size or a
new choice runs eagerly, without a graph. If graphs are off, all steps run eagerly.

The plain version of a step is the model's forward. Two faster versions compute the same function.
fused.py is for NF4 weights on a GPU with Triton, and runs fewer kernels than the plain version.
dense.py is for a CPU, and dequantises the weights only once.

B rows, L length, S positions, D hidden, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from phogpt_raw.data.packing import round_up
from phogpt_raw.decode.dense import dense_step
from phogpt_raw.decode.fused import fused_step
from phogpt_raw.decode.sampling import VALUES, Needs, Sampling, choose
from phogpt_raw.model.cache import Piece, Step, cache_bytes
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT

STEP = 128  # positions; the cache's length is a multiple of STEP
# The cache gets room for this number of new tokens in each row. A larger number would waste memory.
# With a smaller number, the cache would be enlarged more often, which needs new graphs each time.
AHEAD = 1024
PREFILL = 2048  # the largest number of prompt tokens that the model reads at once
GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """ids: the answer's tokens without `</s>`. stopped: whether the model ended the answer with
    `</s>`."""

    ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class Token:
    """The next token of request `key`. If `id` is None, the answer has ended. Then `stopped` tells
    whether the model ended the answer with `</s>`."""

    key: int
    id: int | None
    stopped: bool = False


@dataclass(eq=False)
class Row:
    key: int
    prompt: list[int]
    most: int  # the largest number of tokens in the answer
    seed: int
    sampling: Sampling
    ids: list[int] = field(default_factory=list)  # the answer's tokens so far

    @property
    def written(self) -> int:
        return len(self.ids)


@dataclass
class Pending:
    """A step whose tokens the host has not read yet. keys: the request of each row. read(): waits
    for the step and returns two lists: each row's token, and whether each row has ended."""

    keys: list[int]
    read: Callable[[], list[list[int]]]


@contextmanager
def evaluating(model: PhoGPT):
    """A context with the model in evaluation mode and without gradients. It restores the model's
    mode at its end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Engine:
    """Generates answers with one model, at most `rows` at once. Use it as a context manager.

    The engine collects weights and adapters at the first prompt. If weights or adapters change
    later, a new engine is needed. An engine with one row keeps the cache of the last prompt and its
    answer. If the next prompt begins with the same tokens as the cache, these tokens are not read
    again. So each turn of a conversation costs only its own tokens.

    eos_id: the token that ends an answer. pad_id: the token that fills unused positions. capture:
    whether to run steps as CUDA graphs on a GPU. memory: a function that returns a context manager.
    Large tensors are allocated inside this context.
    """

    def __init__(self, model: PhoGPT, *, eos_id: int, pad_id: int, rows: int = 8,
                 capture: bool = True, memory: Callable[[], AbstractContextManager] = nullcontext):
        if rows < 1:
            raise ValueError(f"{rows} rows: at least one is needed")
        self.model, self.eos_id, self.pad_id = model, eos_id, pad_id
        self.memory, self.most_rows = memory, rows
        self.device = model.head.device
        self.capture = capture and self.device.type == "cuda"
        self.queue: deque[Row] = deque()
        self.rows: list[Row] = []
        self.unread: deque[Pending] = deque()
        self.out: deque[Token] = deque()  # tokens that are on the host and not yet yielded
        self.cache = self.fast = self.history_BS = None
        self.graphs: dict[tuple[int, Needs], torch.cuda.CUDAGraph] = {}
        self.seen: set[tuple[int, Needs]] = set()  # kinds of steps that have run eagerly
        self.kept: list[int] = []  # with one row: tokens whose keys and values are in the cache
        self.steps = 0

    def __enter__(self) -> "Engine":
        self.evaluating = evaluating(self.model)
        self.evaluating.__enter__()
        return self

    def __exit__(self, *error) -> None:
        """Drop all requests and free all memory: graphs, cache and gathered weights."""
        if self.capture:
            torch.cuda.synchronize()
        held = bool(self.graphs)
        self.graphs.clear()
        for requests in (self.queue, self.rows, self.unread, self.out):
            requests.clear()
        self.cache = self.fast = self.history_BS = None
        self.ids_B = self.seed_B = self.last_B = self.ended_B = self.out_2B = None
        self.values_PB, self.kept = None, []
        self.evaluating.__exit__(*error)
        if held:
            torch.cuda.empty_cache()  # frees the graphs' memory pools, which only graphs can use

    # -- requests

    def add(self, key: int, prompt: list[int], max_new_tokens: int, seed: int = 0,
            sampling: Sampling = GREEDY) -> None:
        """Add a request. `run` yields its tokens with this key.

        Raises ValueError for an empty prompt, max_new_tokens below 1, or a key in use.
        """
        if not prompt or max_new_tokens < 1:
            raise ValueError(f"request {key}: the prompt has {len(prompt)} tokens, max_new_tokens "
                             f"is {max_new_tokens}; both must be at least 1")
        if any(row.key == key for row in (*self.queue, *self.rows)):
            raise ValueError(f"request {key}: this key is already in use")
        self.queue.append(Row(key, prompt, max_new_tokens, seed, sampling))

    def drop(self, key: int) -> None:
        """Remove request `key`, finished or not."""
        self.queue = deque(row for row in self.queue if row.key != key)
        self.out = deque(token for token in self.out if token.key != key)
        self.leave(key)

    def run(self) -> Iterator[Token]:
        """Yield tokens as they are written, until all requests are answered.

        A caller that stops early can call `run` again for the remaining tokens.
        """
        while self.queue or self.rows or self.unread or self.out:
            while self.out:
                yield self.out.popleft()
            if self.queue and len(self.rows) < self.most_rows:
                self.read(behind=0)  # before `admit`, because the unread steps lack the new rows
                self.admit()
            elif self.rows:
                self.unread.append(self.launch())
                # A CPU has finished the step. A GPU runs it while the host reads the previous step.
                self.read(behind=0 if self.device.type == "cpu" else 1)
            else:
                self.read(behind=0)

    def answers(self, prompts: list[list[int]], max_new_tokens: int, seed: int = 0,
                sampling: Sampling = GREEDY,
                on_token: Callable[[int], None] | None = None) -> list[Answer]:
        """The answers to `prompts`, in order. `on_token` is called with each token of the first
        answer.

        Raises ValueError if other requests are open.
        """
        if self.queue or self.rows or self.out:
            raise ValueError("other requests are open: read their tokens with run, or drop them")
        for key, prompt in enumerate(prompts):
            self.add(key, prompt, max_new_tokens, seed, sampling)
        written, stopped = [[] for _ in prompts], [False] * len(prompts)
        try:
            for token in self.run():
                if token.id is None:
                    stopped[token.key] = token.stopped
                    continue
                written[token.key].append(token.id)
                if on_token and token.key == 0:
                    on_token(token.id)
        finally:  # leave no request open if on_token raises
            for key in range(len(prompts)):
                self.drop(key)
        return [Answer(*pair) for pair in zip(written, stopped, strict=True)]

    # -- adding and removing rows

    def admit(self) -> None:
        """Start a group of waiting requests in the free rows, the shortest prompts first. The group
        is as large as one pass through the model allows."""
        free = self.most_rows - len(self.rows)
        waiting = sorted((self.queue[n] for n in range(min(free, len(self.queue)))),
                         key=lambda row: len(row.prompt))
        group = [waiting.pop(0)]
        while waiting and len(waiting[0].prompt) * (len(group) + 1) <= PREFILL:
            group.append(waiting.pop(0))
        self.queue = deque(row for row in self.queue if row not in group)
        self.make_room(group)
        self.prefill(group)

    def make_room(self, new: list[Row]) -> None:
        """Make the cache long enough for the current rows, the `new` rows, and the next tokens of
        both."""
        positions = self.positions_for([*self.rows, *new])
        if self.cache is None:
            self.begin(positions)
        elif positions > self.cache.positions:
            self.graphs.clear()  # the graphs use the old tensors
            with self.memory():
                self.cache.grow(positions)
            if self.history_BS is not None:
                longer = self.history_BS[:, :1].repeat(1, positions + 1)
                longer[:, : self.history_BS.shape[1]] = self.history_BS
                self.history_BS = longer
        if self.history_BS is None and Needs.of(row.sampling for row in new).penalty:
            self.history_BS = torch.zeros(self.most_rows, self.cache.positions + 1,
                                          dtype=torch.long, device=self.device)

    def positions_for(self, rows: list[Row]) -> int:
        """The number of cache positions that these rows need for their next AHEAD tokens. A row
        needs fewer positions if its answer may get fewer than AHEAD more tokens."""
        longest = max(len(row.prompt) + min(row.most, row.written + AHEAD) for row in rows)
        return round_up(longest, STEP)

    def begin(self, positions: int) -> None:
        """Allocate the cache and the state of each row on the device."""
        with self.memory():
            self.cache = self.model.new_cache(self.most_rows, positions)
        zeros_B = torch.zeros(self.most_rows, dtype=torch.long, device=self.device)
        self.ids_B, self.seed_B, self.last_B = (zeros_B.clone() for _ in range(3))
        self.ended_B = torch.ones_like(zeros_B, dtype=torch.bool)
        self.out_2B = torch.stack([zeros_B, zeros_B])
        self.values_PB = torch.zeros(VALUES, self.most_rows, device=self.device)
        self.fast = fused_step(self.model, self.cache) or dense_step(self.model, self.cache)

    def prefill(self, group: list[Row]) -> None:
        """Read the prompts of `group` and choose the first token of each answer. The shortest
        prompt must be first."""
        first, lengths = len(self.rows), [len(row.prompt) for row in group]
        known = self.known(group[0].prompt)
        self.kept = self.kept[:known]  # prefill may overwrite the positions of all later tokens
        place = slice(first, first + len(group))
        ids_BL = torch.full((len(group), lengths[-1]), self.pad_id)
        for n, row in enumerate(group):
            ids_BL[n, : lengths[n]] = torch.tensor(row.prompt)
        ids_BL = ids_BL.to(self.device)
        hidden_BD = torch.empty(len(group), self.model.config.d_model,
                                dtype=self.model.head.dtype, device=self.device)
        with self.memory():
            for start in range(known, lengths[-1], PREFILL):
                stop = min(start + PREFILL, lengths[-1])
                piece_BL, piece = ids_BL[:, start:stop], Piece(self.cache, first, start)
                hidden_BLD = (self.fast.read(piece_BL, piece) if self.fast
                              else self.model(piece_BL, cache=piece))
                for n, length in enumerate(lengths):
                    if start < length <= stop:
                        hidden_BD[n] = hidden_BLD[n, length - 1 - start]
        self.cache.place_B[place] = torch.tensor(lengths, device=self.device) - 1
        self.last_B[place] = torch.tensor([n + row.most - 1 for n, row in
                                           zip(lengths, group, strict=True)], device=self.device)
        self.seed_B[place] = torch.tensor([row.seed for row in group], device=self.device)
        self.ended_B[place] = False
        self.values_PB[:, place] = torch.tensor([row.sampling.values() for row in group],
                                                device=self.device).T
        if self.history_BS is not None:
            self.history_BS[place] = ids_BL[:, :1]
            for n, length in enumerate(lengths):
                self.history_BS[first + n, :length] = ids_BL[n, :length]
        self.rows += group
        self.choose(hidden_BD, place, Needs.of(row.sampling for row in group))
        self.unread.append(self.sent(place))
        self.read(behind=0)

    def known(self, prompt: list[int]) -> int:
        """The number of tokens at the beginning of a prompt that are already in the cache. The
        prompt's last token is not counted, because its hidden state must be computed in any case.
        """
        if self.most_rows > 1:
            return 0
        pairs = zip(self.kept, prompt[:-1], strict=False)
        return next((n for n, (one, other) in enumerate(pairs) if one != other),
                    min(len(self.kept), len(prompt) - 1))

    def place_of(self, key: int) -> int | None:
        """The row number of request `key`. None if the request has no row."""
        return next((n for n, row in enumerate(self.rows) if row.key == key), None)

    def leave(self, key: int) -> None:
        """Remove the row of a request. The last row moves into the gap."""
        n = self.place_of(key)
        if n is None:
            return
        last = len(self.rows) - 1
        self.kept = self.rows[n].prompt + self.rows[n].ids[:-1]  # the cache lacks the last id
        if n != last:
            self.cache.move(last, n)
            self.values_PB[:, n] = self.values_PB[:, last]
            for state in (self.ids_B, self.seed_B, self.last_B, self.ended_B, self.history_BS):
                if state is not None:
                    state[n] = state[last]
        self.ended_B[last] = True
        self.rows[n] = self.rows[last]
        self.rows.pop()

    # -- a step

    def launch(self) -> Pending:
        """Start a step for all rows. On a GPU, this method does not wait for the step."""
        rows = len(self.rows)
        # `written` does not count the token of a step that is not read yet. So a row may be one
        # token longer than len(row.prompt) + row.written.
        longest = 2 + max(len(row.prompt) + row.written for row in self.rows)
        if longest > self.cache.positions:
            self.make_room([])
        size = min(self.most_rows, 2 ** math.ceil(math.log2(rows))) if self.capture else rows
        needs = Needs.of(row.sampling for row in self.rows)
        kind = size, needs
        if kind in self.graphs:
            self.graphs[kind].replay()
        elif self.capture and kind in self.seen:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(*kind)
            self.graphs[kind] = graph  # stored only now, because Ctrl-C may interrupt the capture
            graph.replay()
        else:
            self.seen.add(kind)
            self.step(*kind)
        self.steps += 1
        return self.sent(slice(0, rows))

    def step(self, size: int, needs: Needs) -> None:
        """Write one more token in each of the first `size` rows. Ended rows do not change."""
        positions = self.cache.positions
        if not self.capture:  # an eager step reads only the positions in use, which the host knows
            positions = min(positions, 1 + max(len(row.prompt) + row.written for row in self.rows))
        if self.fast:
            hidden_BD = self.fast(self.ids_B[:size], positions)
        else:
            hidden_BD = self.model(self.ids_B[:size, None],
                                   cache=Step(self.cache, size, positions))[:, 0]
        self.choose(hidden_BD, slice(0, size), needs)

    def choose(self, hidden_BD: torch.Tensor, rows: slice, needs: Needs) -> None:
        """Choose these rows' next tokens from their hidden states, and mark the rows that end."""
        place_B, ended_B = self.cache.place_B[rows], self.ended_B[rows]
        history_BS = self.history_BS[rows] if needs.penalty else None
        logits_BV = (self.fast or self.model).logits(hidden_BD).float()
        chosen_B = choose(logits_BV, self.values_PB[:, rows], needs, history_BS, place_B,
                          self.seed_B[rows])
        self.ids_B[rows] = chosen_B = torch.where(ended_B, self.pad_id, chosen_B)
        place_B += ~ended_B
        if history_BS is not None:
            history_BS.scatter_(1, place_B[:, None], chosen_B[:, None])
        ended_B |= (chosen_B == self.eos_id) | (place_B >= self.last_B[rows])
        self.out_2B[0, rows], self.out_2B[1, rows] = chosen_B, ended_B

    def sent(self, rows: slice) -> Pending:
        """Start copying these rows' chosen tokens to the host."""
        keys = [row.key for row in self.rows[rows]]
        if self.device.type != "cuda":
            found = self.out_2B[:, rows].tolist()
            return Pending(keys, lambda: found)
        host = torch.empty(2, len(keys), dtype=torch.long, pin_memory=True)
        host.copy_(self.out_2B[:, rows], non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def read() -> list[list[int]]:
            arrived.synchronize()
            return host.tolist()

        return Pending(keys, read)

    def read(self, behind: int) -> None:
        """Read the tokens of all steps except the last `behind`. Remove the rows that have ended.
        """
        while len(self.unread) > behind:
            pending = self.unread.popleft()
            tokens, ends = pending.read()
            for key, token, end in zip(pending.keys, tokens, ends, strict=True):
                n = self.place_of(key)
                if n is None:
                    continue  # the row of this request was removed meanwhile
                self.rows[n].ids.append(token)
                if token != self.eos_id:
                    self.out.append(Token(key, token))
                if end:
                    self.leave(key)
                    self.out.append(Token(key, None, stopped=token == self.eos_id))


def answer(model: PhoGPT, prompts: list[list[int]], *, eos_id: int, pad_id: int,
           max_new_tokens: int, on_token: Callable[[int], None] | None = None,
           **how) -> list[Answer]:
    """The greedy answers to `prompts` (token ids), in order.

    on_token: called with each token of the first answer. how: more arguments of Engine.
    """
    with Engine(model, eos_id=eos_id, pad_id=pad_id, **{"rows": len(prompts), **how}) as engine:
        return engine.answers(prompts, max_new_tokens, on_token=on_token)


def rows_that_fit(config: ModelConfig, positions: int, itemsize: int, limit_mib: int) -> int:
    """The number of rows of `positions` tokens whose cache takes at most limit_mib MiB, but at
    least 1."""
    row = cache_bytes(config.n_layers, config.d_model, 1, round_up(positions, STEP), itemsize)
    return max(1, limit_mib * 2**20 // row)

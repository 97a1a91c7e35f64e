"""The learned policy in plain Python, slowly: what `native/learned.c` does with lists, heaps and a queue, as a search through
everything. What a chunk of a kind and an age is worth is given; `native/habits.c` derives it.

A prompt is a list of names of chunks. Times are in seconds.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

AGES, TURNS, ANSWERS, SIZES = 64, 5, 6, 8
FINE = 7 * 2 * TURNS * ANSWERS * SIZES
KINDS = FINE + 7 * SIZES
ENDS = [0.05 * 2 ** (age / 3) for age in range(AGES - 1)]


def age_of(seconds: float) -> int:
    return next((age for age, end in enumerate(ENDS) if seconds <= end), AGES - 1)


def size_code(size: int) -> int:
    return min(SIZES - 1, int(math.log2(size)))


def count_code(count: int) -> int:
    return next(code for code, end in enumerate((1, 2, 3, 5, 9, 32, 1 << 20)) if count <= end)


def kind_of(count: int, last: bool, turn: int, new: int) -> int:
    return ((count_code(count) * 2 + last) * TURNS + turn - 1) * ANSWERS * SIZES + size_code(1 + new)


@dataclass
class Group:
    time: float
    prompt: int
    path: int
    kind: int
    turn: int
    size: int = 0
    used: float = -1.0

    def __post_init__(self) -> None:
        if self.used < 0:
            self.used = self.time


@dataclass
class Note:
    group: Group
    access: int = 0
    count: int = 0
    following: bytes = b""
    resident: bool = False
    passed: bool = False


@dataclass
class Rival:
    """What LRU would find, and whether to evict as it does."""

    room: float = math.inf
    filled: bool = False
    leads: bool = False
    times: int = 0
    held: dict[bytes, None] = field(default_factory=dict)
    """What LRU would have, in the order of access."""
    recently: float = 0.0
    asked_recently: float = 0.0
    in_total: float = 0.0
    asked_in_total: float = 0.0
    since: float = 0.0

    def accessed(self, name: bytes) -> None:
        self.held.pop(name, None)
        self.held[name] = None
        for oldest in list(self.held)[:4]:
            if len(self.held) > self.room:
                del self.held[oldest]

    def asked(self, path: list[bytes], resident: list[bool]) -> None:
        if self.room == math.inf:
            return
        gained = _leading(resident) - _leading([name in self.held for name in path])
        room, asked = max(self.room, 64), len(path)
        self.recently = self.recently * math.exp(-asked / (8 * room)) + gained
        self.asked_recently = self.asked_recently * math.exp(-asked / (8 * room)) + asked
        self.in_total = self.in_total * math.exp(-asked / (256 * room)) + gained
        self.asked_in_total = self.asked_in_total * math.exp(-asked / (256 * room)) + asked
        self.since += asked
        if self.leads:
            self.leads = self.since <= room or self.in_total <= -0.0013 * self.asked_in_total
            if not self.leads:
                self.recently = self.asked_recently = 0.0
            return
        earlier = max(0.0, self.in_total - min(0.0, self.recently))
        most = 0.005 * self.asked_recently + 0.02 * room + 0.5 * earlier
        if self.recently < -most or self.in_total < -0.0018 * self.asked_in_total - 0.02 * room:
            self.leads, self.since = True, 0.0
            self.times += 1


def _leading(there: list[bool]) -> int:
    return next((at for at, one in enumerate(there) if not one), len(there))


@dataclass
class Learned:
    """What is remembered of chunks."""

    notes: dict[bytes, Note] = field(default_factory=dict)
    """In the order of access."""
    now: float = 0.0
    accesses: int = 0
    prompts: int = 0
    attached: int = 0
    used: dict[tuple[int, int], float] = field(default_factory=dict)
    ended: dict[tuple[int, int], float] = field(default_factory=dict)
    growing: Group | None = None
    rival: Rival = field(default_factory=Rival)

    def _leave(self, name: bytes, used: bool) -> None:
        note = self.notes[name]
        cell = note.group.kind, age_of(self.now - note.group.time)
        self.ended[cell] = self.ended.get(cell, 0.0) + 1 / note.group.size
        if used:
            self.used[cell] = self.used.get(cell, 0.0) + 1 / note.group.size

    def asked(self, now: float, path: list[bytes]) -> None:
        self.now = max(now, self.now)
        known = next((at for at, name in enumerate(path) if name not in self.notes), len(path))
        self.rival.asked(path, [name in self.notes and self.notes[name].resident for name in path])
        turn, deepest = 1, self.notes[path[known - 1]] if known else None
        if deepest is not None:
            before = deepest.group
            if known == len(path) == before.path and self.now - before.time < 0.05:
                return
            if known >= 2 and known + (2 if before.path > 8 else 1) >= before.path:
                turn = min(TURNS, before.turn + 1)
            if known < len(path) and deepest.count <= 32:
                self._leave_behind(deepest)
        self.prompts += 1
        groups: dict[int, Group] = {}
        following = b""
        for at in reversed(range(len(path))):
            name = path[at]
            if name in self.notes:
                self._leave(name, used=True)
            note = self.notes.pop(name, None) or Note(Group(0, 0, 0, 0, 0))
            note.count += 1
            coarse = count_code(note.count) * 2 + (at + 1 == len(path))
            kind = kind_of(note.count, at + 1 == len(path), turn, len(path) - known)
            note.group = groups.setdefault(coarse, Group(self.now, self.prompts, len(path), kind, turn))
            note.group.size += 1
            self.accesses += 1
            note.access, note.passed, note.following = self.accesses, False, following
            self.notes[name] = note
            self.rival.accessed(name)
            following = name
        self._forget_old(len(path))

    def _leave_behind(self, fork: Note) -> None:
        prompt, left, name = fork.group.prompt, list[bytes](), fork.following
        while name in self.notes and self.notes[name].group.prompt == prompt:
            left.append(name)
            name = self.notes[name].following
        if not left:
            return
        self.prompts += 1
        kind = FINE + count_code(fork.count) * SIZES + size_code(len(left))
        group = Group(self.now, self.prompts, fork.group.path, kind, fork.group.turn, len(left), fork.group.used)
        for name in left:
            self._leave(name, used=False)
            self.notes[name].group = group

    def answered(self, now: float, last: bytes, tokens: int) -> None:
        self.now = max(now, self.now)
        if last not in self.notes:
            return
        prompt = self.notes[last].group.prompt
        code = next(code for code, end in enumerate((16, 64, 256, 1024, 1 << 40), 1) if tokens < end)
        for group in {id(note.group): note.group for note in self.notes.values()}.values():
            if group.prompt == prompt and group.kind < FINE:
                group.kind += (code - group.kind // SIZES % ANSWERS) * SIZES

    def inserted(self, name: bytes, parent: bytes) -> None:
        self.attached += 1
        self.rival.filled = True
        if self.rival.room < self.attached:
            self.rival.room = self.attached
        if name not in self.notes:
            above = self.notes[parent].group if parent else None
            turn = above.turn if above else 1
            if above is None or above is not self.growing or above.time != self.now:
                self.prompts += 1
                self.growing = Group(
                    self.now, self.prompts, above.path if above else 1, kind_of(1, False, turn, 1), turn
                )
            assert self.growing is not None
            self.growing.size += 1
            self.accesses += 1
            self.notes[name] = Note(self.growing, self.accesses, 1)
            self.notes[name].resident = True
            self.rival.accessed(name)
            self._forget_old(1)
        self.notes[name].resident = True

    def evicts(self) -> None:
        if self.rival.filled:
            self.rival.room = self.attached
        self.rival.filled = False

    def removed(self, name: bytes) -> None:
        self.attached -= 1
        self.notes[name].resident = False
        if self.notes[name].passed:
            self._leave(name, used=False)
            self.rival.held.pop(name, None)
            del self.notes[name]

    def _forget_old(self, accesses: int) -> None:
        most = max(1024, 16 * self.attached)
        left = 2 * accesses + 16
        for name, note in list(self.notes.items()):
            if note.passed:
                continue
            if not left or self.accesses - note.access < most:
                break
            left -= 1
            if note.resident:
                note.passed = True
            else:
                self._leave(name, used=False)
                self.rival.held.pop(name, None)
                del self.notes[name]

    def place(self, name: bytes, worth: array[float]) -> tuple[float, float, int]:
        """Where the chunk stands: the one with the least place is evicted first."""
        group = self.notes[name].group
        if self.rival.leads:
            return 0.0, group.used, group.prompt
        return worth[group.kind * AGES + age_of(self.now - group.time)], group.used, group.prompt

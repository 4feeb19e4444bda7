# SPDX-License-Identifier: Apache-2.0
"""A lease's end: what the keeper observes, and where the table lets it go on that.

An observation is true of the card and of the processes when it is made. A row of the table can be
taken whenever the facts that it names were observed, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.keeper.map_state import MapState
from holdfast.keeper.state import FORGOTTEN, QUIET_PROOFS, Event, Fact, Row, State
from holdfast.spec import measures
from holdfast.spec.layout import Batch, Mask
from holdfast.spec.lease_words import DYING, LEASE, NUMBER, Effect, Guard, LeaseWords
from holdfast.spec.rules import Rule
from holdfast.spec.world import Eng, Know


class LeaseDeath(LeaseWords):
    """What the keeper does about the death of one lease's process."""

    def death_rules(self) -> Iterator[Rule]:
        """All of it."""
        yield self._hang_up()
        yield from self._observations()
        for row in self.tables.rows:
            yield from self._row(row)

    # -- death and what is observed ------------------------------------------------------------

    def _hang_up(self) -> Rule:
        w, p = self.w, self.p

        def hang_up(n: Batch) -> None:
            n[w.file[p]] = 0
            n[w.kills] = n[w.kills] + 1

        return self._rule(
            "hang_up", f"process {p} closes its connection and keeps its doorbell",
            lambda s: w.alive(s, p) & s.on(w.file[p]) & s.on(w.window[p]) & s.on(self.lease)
            & s.lt(w.kills, w.setting.bounds.kills), hang_up, fair=False,
            actor=f"P{p}",
        )  # fmt: skip

    def _observations(self) -> Iterator[Rule]:
        w, p = self.w, self.p

        def fact(
            fact: Fact, text: str, where: Guard, also: Effect | None = None, *, fair: bool = True
        ) -> Rule:
            def observe(n: Batch) -> None:
                if also is not None:
                    also(n)
                if fact in QUIET_PROOFS and self.tables.gate_asks_for(Fact.CANNOT_POST):
                    n[w.late[p]] = ~self._fact(n, Fact.CANNOT_POST)
                self._observe(n, fact)

            return self._rule(
                "observe", f"for process {p}: {text}",
                lambda s: where(s) & ~self._fact(s, fact), observe, fair=fair,
                about={"fact": NUMBER[fact]},
            )  # fmt: skip

        def signs(s: Batch) -> Mask:
            hung_up, dead = self._signs(s)
            return hung_up & dead & s.among(self.lease, DYING)

        yield fact(Fact.CANNOT_POST, "both signs of death have come", signs)
        yield fact(
            Fact.IDLE_CONFIRMED, "the card is seen at rest",
            lambda s: self._is(s, State.DRAINING, State.ISOLATING, State.QUARANTINE)
            & self._seen_at_rest(s),
        )  # fmt: skip
        yield fact(
            Fact.STOP_ACKNOWLEDGED, "the card stops, and acknowledges it",
            lambda s: self._is(s, State.STOPPING) & s.eq(w.eng, Eng.RUN),
            lambda n: w.abort(n, p), fair=False,
        )  # fmt: skip
        yield fact(
            Fact.RESET_TRUSTED, "the card is reset, and is known to stop at that",
            lambda s: self._is(s, State.RESETTING, State.QUARANTINE) & s.off(w.lies)
            & s.ne(w.eng, Eng.GONE),
            self._reset, fair=False,
        )  # fmt: skip
        yield self._false_reset()
        yield fact(
            Fact.FUNCTION_GONE, "the card is gone, and its process reaped",
            lambda s: s.among(self.lease, DYING) & s.eq(w.eng, Eng.GONE) & w.delivered(s),
        )  # fmt: skip
        yield self._look_again()
        yield fact(
            Fact.FLUSHED, "a read from the card comes back",
            lambda s: self._is(s, State.QUIET) & w.delivered(s) & s.off(w.late[p])
            & s.ne(w.eng, Eng.GONE)
            & ~self._missing(s, Fact.CANNOT_POST),
            self._known_quiet,
        )  # fmt: skip

    def _known_quiet(self, n: Batch) -> None:
        n.put(self.w.know[self.p], Know.QUIET_ACK, n.eq(self.w.know[self.p], Know.UNKNOWN))
        self.w.forget(n, self.p, self.w.rests(n, self.p))

    def _reset(self, n: Batch) -> None:
        w = self.w
        n[w.bme] = 0
        n[w.isolated[self.p]] = 1
        measures.reset_works(w, n)

    def _false_reset(self) -> Rule:
        """Acknowledged, and nothing has changed but that bus mastering was on for a moment."""
        w = self.w

        def nothing(n: Batch) -> None:
            n[w.isolated[self.p]] = 1

        return self._rule(
            "false_reset", f"for process {self.p}: the reset is acknowledged, and stops nothing",
            lambda s: self._is(s, State.RESETTING) & s.on(w.lies) & s.off(w.isolated[self.p]),
            nothing, fair=False,
        )  # fmt: skip

    def _look_again(self) -> Rule:
        w, p = self.w, self.p

        def look(n: Batch) -> None:
            n[w.late[p]] = 0

        return self._rule(
            "look_again", f"for process {p}: nobody can post any more, and the card is at rest",
            lambda s: self._is(s, State.QUIET) & s.on(w.late[p]) & self._seen_at_rest(s)
            & self._fact(s, Fact.CANNOT_POST),
            look,
        )  # fmt: skip

    # -- the table ------------------------------------------------------------

    def _row(self, row: Row) -> Iterator[Rule]:
        w, p = self.w, self.p

        def can(s: Batch) -> Mask:
            ready = self._is(s, row.source)
            for fact in row.needs:
                ready &= self._fact(s, fact)
            return ready & self._moment(s, row)

        def go(n: Batch) -> None:
            n[self.lease] = LEASE[row.target]
            self._enter(n, row)

        if row.source is State.FROZEN and row.event is not self.tables.first:
            return
        # That something fails is always possible, and never certain: but time passes for sure.
        fair = row.event is not Event.NO_PROOF or row.source is State.RESETTING
        label, about = f"{row.target}/{row.event}", {"row": self.tables.rows.index(row)}
        yield self._rule(
            "step", f"the lease of process {p}: {row.event}, so it is {row.target}", can, go,
            fair=fair, label=label, about=about,
        )  # fmt: skip
        if row.source is State.QUIET and row.event is Event.NO_PROOF:

            def disturbed(s: Batch) -> Mask:
                late = s.on(w.late[p]) & self._fact(s, Fact.CANNOT_POST)
                return can(s) & late & ~self._seen_at_rest(s)

            def withheld(s: Batch) -> Mask:
                return can(s) & s.on(w.tried[p]) & ~self._gate(s)

            yield self._rule(
                "step", f"the lease of process {p}: the card was started again, {row.target}",
                disturbed, go, label=label, about=about,
            )  # fmt: skip
            yield self._rule(
                "step", f"the lease of process {p}: no read comes back in time, {row.target}",
                lambda s: can(s) & self._missing(s, Fact.FLUSHED), go, label=label, about=about,
            )  # fmt: skip
            yield self._rule(
                "step", f"the lease of process {p}: the gate stays shut, so it is {row.target}",
                withheld, go, label=label, about=about,
            )  # fmt: skip

    def _moment(self, s: Batch, row: Row) -> Mask:
        """When the keeper's code can come to report an event at all, facts aside."""
        if row.event is Event.DEATH:
            hung_up, dead = self._signs(s)
            return hung_up | dead
        if row.event is Event.FREED:
            undone = s.on(self.w.tried[self.p])
            return undone & ~self._maps(s, MapState.UNMAPPING) & self._gate(s)
        return s.true()

    def _gate(self, s: Batch) -> Mask:
        opened = s.false()
        for way in self.tables.gate.ways:
            seen = s.true()
            for fact in way:
                seen &= self._fact(s, fact)
            opened |= seen
        return opened

    def _enter(self, n: Batch, row: Row) -> None:
        w, p = self.w, self.p
        if row.target is State.ISOLATING:
            n[w.isolated[p]] = 1
            n[w.bme] = 0
        elif row.target is State.QUIET:
            n.put(w.late[p], 0, self._fact(n, Fact.FUNCTION_GONE))
            n[w.tried[p]] = 0
        elif row.target is State.UNMAPPED:
            n[w.late[p]] = 0  # whoever posts now reaches nothing
            n[w.tried[p]] = 0
        elif row.target is State.QUARANTINE:
            n[w.tried[p]] = 0
            n[w.been[p]] = 1
            for fact in FORGOTTEN:
                n[w.fact[p, NUMBER[fact]]] = 0
        elif row.target is State.RELEASED:
            self._free(n)

    def _free(self, n: Batch) -> None:
        """Unpin and punch: whoever still maps the file finds a hole where the pages were."""
        w, p = self.w, self.p
        self._judge_release(n)
        n[w.charged[p]] = 0
        for f in w.frames:
            held = n.on(w.hold[p, f])
            for d in w.descriptors:
                still = n.on(w.owner[d, p]) & w.may_access(n, d) & w.reaches(n, d, f)
                n.fail("S8", held & still & n.on(w.been[p]))
            for q in w.processes:
                w.clear_entry(n, q, f, held)
        w.unhold(n, p)
        n[w.know[p]] = Know.UNKNOWN
        for cell in (w.isolated[p], w.anchored[p], w.late[p], w.tried[p], w.window[p],
                     w.been[p]):  # fmt: skip
            n[cell] = 0
        for fact in Fact:
            n[w.fact[p, NUMBER[fact]]] = 0

    def _judge_release(self, n: Batch) -> None:
        """S3 by what the keeper believes: facts, not the card's true state."""
        w, p = self.w, self.p
        proven = n.false()
        for fact in (Fact.IDLE_CONFIRMED, Fact.STOP_ACKNOWLEDGED, Fact.RESET_TRUSTED,
                     Fact.FUNCTION_GONE):  # fmt: skip
            proven |= self._fact(n, fact)
        n.put(w.know[p], Know.RESET_ACK, proven & n.eq(w.know[p], Know.UNKNOWN))

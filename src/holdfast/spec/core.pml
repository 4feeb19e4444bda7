/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The core of the specification once more, in another language, for another model checker.
 *
 * Facts. A search that claims to try every order of events can be wrong in its rules, in how it
 * packs states, and in how it finds them again; each can hide what was to be found. SPIN has been
 * checking protocols for thirty years, and shares no line with this project.
 *
 * Choice. Two models of one thing have equally many states that can be reached, and shortest
 * stories of equal length. A rule that is too strict or too lax in one of them changes these
 * numbers. So this is written from the meaning: a process goes through its life from top to bottom,
 * and where it stands is no variable; a frame has a name, not a bit. But every event is one step
 * (d_step), here as there. tests/spec/test_against_spin.py compares.
 *
 * Cost. Only the core, BOUNDS["core"]: two frames, two processes, Linux 7, no IOMMU; nobody forks,
 * nothing is paged out, the card does not fail. Where the facts about kernels and cards come from
 * stands in kernel.py and card.py.
 *
 *     spin -a -DWAITS -DASK=S1 core.pml && gcc -DNOREDUCE -DBFS -o pan pan.c && ./pan
 *
 * One of these says how memory is held, and until when after the last close:
 *   MLOCK     the process locks its buffer; the driver counts on nothing
 *   WAITS     a reference to the page, until the card was seen at rest and a read came back
 *   TIMEOUT   a reference to the page, until nobody wants to wait any longer
 *
 * ASK is a sum of what must never be (S1+S2); without it, states are only counted. DESCRIPTORS (1
 * or 2) and KILLS are bounds.
 *
 * Two mistakes can be planted, to see that they would be found:
 *   NO_READ      the card is seen at rest, but no read flushes what it has sent
 *   DEAD_POSTS   as long as a process has its window to the card it may post, be it dead
 */

#if defined(MLOCK) + defined(WAITS) + defined(TIMEOUT) != 1
#error "one of MLOCK, WAITS, TIMEOUT"
#endif
#ifndef DESCRIPTORS
#define DESCRIPTORS 2
#endif
#ifndef KILLS
#define KILLS       2
#endif
#define FRAMES      2
#define PROCESSES   2           /* numbers 0 and 1 of SPIN's processes: they are declared first */
#define NOWHERE     FRAMES
#define NOBODY      PROCESSES

#define S1          1           /* a write lands in a frame that is free, or given back since */
#define S1_VICTIM   2           /* the same, and somebody else has the frame */
#define S2          4           /* a frame went while a descriptor that names it was not done */
#define S3          8           /* a frame was let go without proof, or while a write to it came */
#define S4          16          /* a free frame is the target of a descriptor or write to come */
#define S6          32          /* a frame's count is lower than those who count on it */
#define S7          64          /* bus mastering came on while earlier work could go on */
#define S9          128         /* the card was believed quiet and was not */
#ifndef ASK
#define ASK         0
#endif
#define NEVER(invariant, broken) assert(((ASK) & invariant) == 0 || !(broken))

/* -- memory ------------------------------------------------------------------------------------ */

byte count[FRAMES];             /* who asks for memory may get a frame on which nobody counts */
bool innocent[FRAMES];          /* somebody has it who has nothing to do with all this */

/* -- processes, each with one buffer of one page ----------------------------------------------- */

byte page[PROCESSES] = NOWHERE;         /* where its page table leads */
byte held[PROCESSES] = NOWHERE;         /* what the driver counts on for it */
byte registered[PROCESSES] = NOWHERE;   /* what its descriptors name */
bool current[PROCESSES];                /* that frame was not given back since */
bool opened[PROCESSES];                 /* it has opened the card, once */
bool releasing[PROCESSES];              /* its release has begun, and is not done */
bool seen_quiet[PROCESSES];             /* the card was seen at rest for it, and a read came back */
byte killed;

/* -- descriptors and the card ------------------------------------------------------------------ */

byte target[DESCRIPTORS] = NOWHERE;
byte owner[DESCRIPTORS] = NOBODY;
bool fresh[DESCRIPTORS];                /* the target was not given back since the post */

mtype:card = { NOTHING, POSTED, FETCHED, FIRST_SENT, LAST_SENT };
mtype:card card[DESCRIPTORS] = NOTHING; /* sent: it has left the card, and need not have arrived */

mtype:software = { IDLE, PENDING, SIGNALLED, NOTED };
mtype:software told[DESCRIPTORS] = IDLE;

bool on_its_way[DESCRIPTORS];           /* a write, posted by the card, somewhere in the fabric */
bool bus_master;

#if DESCRIPTORS == 1
#define ANY(what) (what(0))
#define EACH(what) what(0)
#define OPTION_EACH(what) :: d_step { what(0) }
#else
#define ANY(what) (what(0) || what(1))
#define EACH(what) what(0); what(1)
#define OPTION_EACH(what) :: d_step { what(0) } :: d_step { what(1) }
#endif

#define FREE(f)             (count[f] == 0)
#define UNFINISHED(d)       (card[d] == POSTED || card[d] == FETCHED || card[d] == FIRST_SENT)
#define WRITES(d)           ((bus_master && UNFINISHED(d)) || on_its_way[d])
#define ON_ITS_WAY(d)       (on_its_way[d])
#define MINE_UNFINISHED(d)  (owner[d] == _pid && UNFINISHED(d))
#define MINE_ON_ITS_WAY(d)  (owner[d] == _pid && on_its_way[d] && target[d] == held[_pid])

/* What a frame was is forgotten when nobody counts on it any more: who named it names another. */

inline outdate_descriptor(d, f)
{
    if
    :: target[d] == f -> fresh[d] = false
    :: else
    fi
}

inline outdate_registration(p, f)
{
    if
    :: registered[p] == f -> current[p] = false
    :: else
    fi
}

inline drop(f)
{
    NEVER(S6, FREE(f));
    count[f]--;
    if
    :: FREE(f) ->
        outdate_registration(0, f);
        outdate_registration(1, f);
        outdate_descriptor(0, f);
#if DESCRIPTORS > 1
        outdate_descriptor(1, f)
#endif
    :: else
    fi
}

/* -- a process, from its start to its end ------------------------------------------------------ */

inline arrive(f)
{
    FREE(f) ->
    count[f]++;
    page[_pid] = f
}

/* The card is not given out in the middle of a release. */
inline open_card()
{
    !opened[_pid] && !releasing[0] && !releasing[1] ->
    NEVER(S7, !bus_master && ANY(UNFINISHED));
    bus_master = true;
    opened[_pid] = true;
    registered[_pid] = page[_pid];
    current[_pid] = true;
#ifndef MLOCK                           /* nothing is paged out here, so a lock changes nothing */
    held[_pid] = page[_pid];
    count[page[_pid]]++
#endif
}

/* Descriptors are used once, in their order. */
inline post(d)
{
    opened[_pid] && told[d] == IDLE && (d == 0 || told[d - 1] != IDLE) ->
    owner[d] = _pid;
    target[d] = registered[_pid];
    fresh[d] = current[_pid];
    told[d] = PENDING;
    card[d] = POSTED;
    seen_quiet[_pid] = false
}

inline take_note(d)
{
    owner[d] == _pid && told[d] == SIGNALLED ->
    told[d] = NOTED
}

inline lose_page()
{
    drop(page[_pid]);
    page[_pid] = NOWHERE
}

inline forget(d)
{
    if
    :: owner[d] == _pid -> card[d] = NOTHING
    :: else
    fi
}

/* At rest, the card does no more for this owner than what has left it already. A read from the card
 * pushes all that before it, so that its answer ends the doubt. */
#define AT_REST         (!ANY(MINE_UNFINISHED))
#ifdef NO_READ
#define READ_CAME_BACK  true
#else
#define READ_CAME_BACK  (!ANY(ON_ITS_WAY))
#endif

inline begin_release()
{
#if defined(WAITS)
    opened[_pid] && AT_REST && READ_CAME_BACK ->
    seen_quiet[_pid] = true;
    EACH(forget);
#elif defined(TIMEOUT)
    opened[_pid] ->                     /* one grows tired of waiting at any moment */
#else
    opened[_pid] ->                     /* addresses are taken away */
#endif
    releasing[_pid] = true
}

inline let_go()
{
#ifndef MLOCK
    NEVER(S3, !seen_quiet[_pid] || ANY(MINE_ON_ITS_WAY));
    drop(held[_pid]);
    held[_pid] = NOWHERE;
#endif
    registered[_pid] = NOWHERE;
    releasing[_pid] = false
}

active [PROCESSES] proctype process()
{
end_absent:
    if
    :: d_step { arrive(0) }
    :: d_step { arrive(1) }
    fi;

end_alive:
    do
    :: d_step { open_card() }
    OPTION_EACH(post)
    OPTION_EACH(take_note)
    :: d_step { killed < KILLS -> killed++ } -> break
    od;

    /* do_exit. A step that changes nothing here is one all the same: others may come between. */
    skip;                               /* notifiers are called */
    d_step { lose_page() };
    do
#ifdef DEAD_POSTS
    OPTION_EACH(post)
#endif
    :: skip -> break                    /* its window to the card is closed */
    od;
    skip;                               /* its files are closed */

    /* Who closes a file last runs its release, and does not end before that has. */
    if
    :: !opened[_pid]                    /* its end is announced at once */
    :: d_step { begin_release() };
#ifndef MLOCK
        skip;                           /* addresses are taken away: in what IOMMU? */
#endif
        d_step { let_go() };
        skip                            /* its end is announced */
    fi;
    skip;                               /* its parent has waited for it */
end_reaped:
    false
}

/* -- everybody else ---------------------------------------------------------------------------- */

inline give_away(f)
{
    FREE(f) ->
    innocent[f] = true;
    count[f]++
}

active proctype others()
{
end:
    do
    :: d_step { give_away(0) }
    :: d_step { give_away(1) }
    od
}

inline fetch(d)
{
    card[d] == POSTED && bus_master -> card[d] = FETCHED
}

/* Two writes for each descriptor: the second waits until the first has arrived. */
inline send_first(d)
{
    card[d] == FETCHED && bus_master && !on_its_way[d] ->
    card[d] = FIRST_SENT;
    on_its_way[d] = true
}

inline send_last(d)
{
    card[d] == FIRST_SENT && bus_master && !on_its_way[d] ->
    card[d] = LAST_SENT;
    on_its_way[d] = true
}

/* Some cards say that they are done before they are. */
inline signal(d)
{
    told[d] == PENDING && (card[d] == FIRST_SENT || card[d] == LAST_SENT) ->
    told[d] = SIGNALLED
}

active proctype device()
{
end:
    do
    OPTION_EACH(fetch)
    OPTION_EACH(send_first)
    OPTION_EACH(send_last)
    OPTION_EACH(signal)
    od
}

#define WRONG(d)        (FREE(target[d]) || !fresh[d])
#define OTHER(d)        (1 - owner[d])
#define HAS(p, f)       (page[p] == f || held[p] == f)
#define VICTIM(d)       (innocent[target[d]] || HAS(OTHER(d), target[d]))

inline land(d)
{
    on_its_way[d] ->
    NEVER(S1, WRONG(d));
    NEVER(S1_VICTIM, WRONG(d) && VICTIM(d));
    on_its_way[d] = false
}

active proctype fabric()
{
end:
    do
    OPTION_EACH(land)
    od
}

/* -- what must never be, of states ------------------------------------------------------------- */

#define GONE(d)             (WRITES(d) && told[d] != IDLE && WRONG(d))
#define INTO_THE_FREE(d)    (WRITES(d) && FREE(target[d]))
#define USERS(f)            (innocent[f] + (page[0] == f) + (page[1] == f) \
                             + (held[0] == f) + (held[1] == f))
#define NOT_QUIET(d)        ((UNFINISHED(d) || on_its_way[d]) && seen_quiet[owner[d]])

/* Looks, which is no event: what it finds was there a step before. */
active proctype watcher()
{
end:
    do
    :: d_step { ((ASK) & S2) && ANY(GONE) -> assert(false) }
    :: d_step { ((ASK) & S4) && ANY(INTO_THE_FREE) -> assert(false) }
    :: d_step { ((ASK) & S6) && (count[0] < USERS(0) || count[1] < USERS(1)) -> assert(false) }
    :: d_step { ((ASK) & S9) && ANY(NOT_QUIET) -> assert(false) }
    od
}

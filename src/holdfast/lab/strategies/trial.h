/* SPDX-License-Identifier: Apache-2.0 */
/* One trial: an application with a running transfer meets its fate, an innocent gets memory.
 *
 * The program is the *harness*. Where a strategy has a keeper, the harness is also the keeper;
 * where it has none, the harness holds nothing of the application's. It starts
 *
 *   the innocent   before anything else exists, so that it can inherit nothing;
 *   the application  which prepares its memory as its strategy says, rings the card's doorbell
 *                  (card -> memory) and undergoes the event asked for.
 *
 * When the event is over (the process reaped, or its call returned), the keeper does what its
 * strategy makes it do; then the innocent takes memory, fills every word of it with its own pattern
 * and, when the card is idle, looks for words that it did not write. Content is the only judge.
 * The frame number is compared too, but only to say whether the innocent got the very frame.
 *
 * A trial counts only if the innocent had filled its memory within the card's 100 ms: then
 * any foreign word was written by the card afterwards. All processes run on CPU 0, because freed
 * frames go to the list of the CPU that freed them, last in, first out (mm/page_alloc.c,
 * free_unref_page). The innocent takes a second helping on CPU 1: the OOM reaper may have run there.
 */
#ifndef TRIAL_H
#define TRIAL_H

#include "machine.h"
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define PLENTY 384    /* pages per CPU, */
#define HELPING_MS 30 /* as far as the window goes: until 60 and 90 ms after the doorbell */
#define ENOUGH 64     /* pages at least, or the trial does not count */
#define PATTERN 0x5a5a5a5au

struct trial {
	const char *bdf, *event, *variant;
	uint32_t stamp;
	volatile char *bar;    /* the card as this process sees it; NULL where it has no right to */
	int report, read_report; /* application -> harness */
	int go, await_go;        /* harness -> innocent */
	int answer, read_answer; /* innocent -> harness */
	pid_t application, ghost;
	int stuck;                /* the release that was waited for did not come */
	volatile int rung;        /* for a ghost, which shares the application's memory */
};

/* What differs between strategies. Hooks may be NULL. */
struct strategy {
	void (*keeper)(struct trial *);                /* before the application starts */
	void (*application)(struct trial *);           /* prepare, ring(), undergo() */
	void (*aftermath)(struct trial *);             /* the keeper, after the event */
	char *(*take)(size_t pages);                   /* how the innocent gets memory; else mmap */
	void (*tenancy)(struct trial *, char *memory); /* the innocent, after it filled its memory */
	int (*arrived)(struct trial *);                /* the keeper, when the card is idle */
};

struct report { char kind; int arrived; pid_t ghost; double at; uint64_t frame; };
struct answer { double filled; int pages, got, foreign, stamped; };

static int is(const char *a, const char *b) { return !strcmp(a, b); }

static void run_on(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set); /* a machine with one CPU is no worse */
}

static void put(int pipe, const void *what, size_t size)
{
	if (write(pipe, what, size) != (ssize_t)size)
		MUST(-1);
}

static int get(int pipe, void *what, size_t size)
{
	return read(pipe, what, size) == (ssize_t)size;
}

static void need(int pipe, void *what, size_t size)
{
	if (!get(pipe, what, size)) {
		fprintf(stderr, "a process of this trial ended before its time\n");
		exit(3);
	}
}

/* -- the innocent process ------------------------------------------------------------ */

struct area { uint32_t *memory; size_t pages; };

/* Fills page by page, as many as there are, or as fit before `until`. */
static void fill(struct area *area, size_t pages, double until)
{
	while (area->pages < pages && now() < until) {
		memset(area->memory + area->pages * PAGE / 4, PATTERN & 0xff, PAGE);
		area->pages++;
	}
}

static int has_frame(struct area area, uint64_t frame)
{
	static uint64_t frames[2 * HUGE / PAGE];
	int found = 0;
	frames_of(area.memory, frames, area.pages);
	for (size_t i = 0; i < area.pages; i++)
		found |= frames[i] == frame;
	return found;
}

static void look(struct area area, uint32_t stamp, struct answer *a)
{
	for (volatile uint32_t *w = area.memory; w < area.memory + area.pages * PAGE / 4; w++)
		a->foreign += *w != PATTERN;
	for (size_t i = 0; i < area.pages; i++)
		a->stamped |= has_stamp(area.memory + i * PAGE / 4, stamp);
}

/* Each CPU holds on to the frames that it handled last, in small batches (mm/swap.c, mm/mlock.c),
 * even if nobody else does. Any mlock empties them; this one takes no frame for itself. */
static void empty_batches(void)
{
	char *page = private_memory(PAGE);
	MUST(mlock2(page, PAGE, MLOCK_ONFAULT));
	MUST(munmap(page, PAGE));
}

static char *take_private(size_t pages) { return private_memory(pages * PAGE); }

/* Fills its own page, if it has one, and plenty of memory; looks at all of it later. */
static void innocent(struct trial *t, const struct strategy *s, char *own)
{
	struct area areas[3] = {{(uint32_t *)own, 0}};
	struct answer a = {0};
	struct report rung;

	close(t->go);
	close(t->report);
	need(t->await_go, &rung, sizeof rung);
	fill(&areas[0], own ? 1 : 0, rung.at + WINDOW_MS);
	for (int i = 1; i < (s->take ? 2 : 3); i++) {
		run_on(i - 1);
		empty_batches();
		areas[i].memory = (uint32_t *)(s->take ? s->take : take_private)(PLENTY);
		fill(&areas[i], PLENTY, rung.at + (i + 1) * HELPING_MS);
		a.pages += areas[i].pages;
	}
	if (s->tenancy)
		s->tenancy(t, (char *)areas[1].memory);
	a.filled = now();
	for (int i = 0; i < 3; i++)
		a.got |= has_frame(areas[i], rung.frame);
	put(t->answer, &a, sizeof a);

	need(t->await_go, &rung, sizeof rung);
	for (int i = 0; i < 3; i++)
		look(areas[i], t->stamp, &a);
	put(t->answer, &a, sizeof a);
	_exit(0);
}

/* -- the application ------------------------------------------------------------ */

/* Anything that takes time before the doorbell, so that the window is left for the event. */
static void get_ready(struct trial *t)
{
	char path[64];
	if (!is(t->event, "oom"))
		return;
	mkdir("/sys/fs/cgroup", 0755);
	/* by number: <sys/mount.h> and <linux/io_uring.h> do not go together in older libcs */
	if (syscall(SYS_mount, "none", "/sys/fs/cgroup", "cgroup2", 0, NULL) && errno != EBUSY)
		lacking("cgroup2");
	write_text("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	snprintf(path, sizeof path, "/sys/fs/cgroup/trial-%d", getpid());
	MUST(mkdir(path, 0755));
	MUST(chdir(path));
	write_text("memory.max", "1M");
	write_text("cgroup.procs", "0");
}

/* How much memory the application has; the card's target is the last page of it, because the
 * frame freed last is handed out first. */
static size_t region(struct trial *t) { return is(t->event, "collapse") ? HUGE : PAGE; }

static char *target(struct trial *t, char *memory) { return memory + region(t) - PAGE; }

static void ring(struct trial *t, const void *page, uint64_t bus_address, pid_t ghost)
{
	struct report r = {'R', 0, ghost, now(), frame_of(page)};
	card_to_memory(t->bar, bus_address);
	t->rung = 1;
	put(t->report, &r, sizeof r);
}

/* Private memory is copied on write: the parent writes first, so the parent gets the copy, and the
 * frame that the card knows is left to the child, or to nobody. The child is the innocent. */
static void fork_and_write(struct trial *t, char *page)
{
	static const struct strategy none;
	if (!MUST(fork()))
		innocent(t, &none, page);
	*(volatile char *)page = 1;
	empty_batches();
}

static void undergo_call(struct trial *t, char *memory, size_t size)
{
	int done = 0;
	if (is(t->event, "munmap"))
		done = munmap(memory, size);
	else if (is(t->event, "remove"))
		done = madvise(memory, size, MADV_REMOVE);
	else if (is(t->event, "fork"))
		fork_and_write(t, target(t, memory));
	else if (is(t->event, "collapse")) {
		/* What khugepaged does to any process by itself (mm/khugepaged.c). */
		madvise(memory, size, MADV_HUGEPAGE);
		done = madvise(memory, size, 25 /* MADV_COLLAPSE */);
	} else if (is(t->event, "dontneed")) {
		done = madvise(memory, size, MADV_DONTNEED);
		if (done && errno == EINVAL) /* mlocked: needs its own advice since 5.18 */
			done = madvise(memory, size, 24 /* MADV_DONTNEED_LOCKED */);
	}
	struct report r = {done ? 'X' : 'D', 0, 0, now(), done ? errno : 0};
	put(t->report, &r, sizeof r);
}

/* The event under the transfer. Returns only if the process is alive and the card idle. */
static void undergo(struct trial *t, char *memory, size_t size)
{
	if (is(t->event, "kill"))
		for (;;)
			pause();
	if (is(t->event, "exec")) /* closes the report, which tells the harness */
		MUST(execl("/proc/self/exe", "bystander", NULL));
	if (is(t->event, "oom"))
		for (;;)
			memset(private_memory(8 << 20), 1, 8 << 20);
	undergo_call(t, memory, size);
	await_idle(t->bar);
	struct report r = {'I', 0, 0, now(), 0};
	if (is(t->event, "fork") || is(t->event, "collapse"))
		r.arrived = has_stamp((uint32_t *)target(t, memory), t->stamp);
	put(t->report, &r, sizeof r);
	for (;;)
		pause();
}

/* -- the harness ------------------------------------------------------------ */

/* A child that does not survive a harness that gave up. */
static pid_t start_process(void)
{
	pid_t child = MUST(fork());
	if (!child)
		MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
	return child;
}

static struct trial begin(int argc, char **argv)
{
	struct trial t = {0};
	int fds[2];
	if (is(argv[0], "bystander")) /* what the application became by exec */
		for (;;)
			pause();
	if (argc < 4) {
		fprintf(stderr, "usage: %s BDF EVENT STAMP [VARIANT]\n", argv[0]);
		exit(2);
	}
	t.bdf = argv[1];
	t.event = argv[2];
	t.stamp = strtoul(argv[3], NULL, 0);
	t.variant = argc > 4 ? argv[4] : "";
	MUST(pipe2(fds, O_CLOEXEC)), t.read_report = fds[0], t.report = fds[1];
	MUST(pipe2(fds, O_CLOEXEC)), t.await_go = fds[0], t.go = fds[1];
	MUST(pipe2(fds, O_CLOEXEC)), t.read_answer = fds[0], t.answer = fds[1];
	run_on(0);
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1)); /* ghosts are reaped here */
	signal(SIGPIPE, SIG_IGN);
	return t;
}

/* Puts this trial's stamp into the card's buffer, from a page of this process. */
static void prime(struct trial *t, uint32_t *page, uint64_t bus_address)
{
	write_stamp(page, t->stamp);
	card_from_memory(t->bar, bus_address);
	await_idle(t->bar);
}

/* Without an IOMMU: card enabled, stamped, its registers mapped. */
static void prime_physical(struct trial *t)
{
	char *page = private_memory(PAGE);
	MUST(mlock(page, PAGE));
	*page = 1;
	pci_command(t->bdf, 2 | 4);
	t->bar = sysfs_bar(t->bdf);
	await_idle(t->bar);
	prime(t, (uint32_t *)page, frame_of(page) * PAGE);
	MUST(munmap(page, PAGE));
}

/* Until the event is over: death is reaped, exec has closed the pipe, a call has said so.
 * Exec closes descriptors in ascending order and releases their files in the opposite one
 * (fs/file.c, do_close_on_exec; kernel/task_work.c, task_work_run): the pipe, opened first, goes
 * last.
 * Returns the errno of a call that was refused. */
static int await_event(struct trial *t)
{
	struct report r = {0};
	int status;
	if (is(t->event, "kill"))
		MUST(kill(t->application, SIGKILL));
	if (is(t->event, "kill") || is(t->event, "oom")) {
		MUST(waitpid(t->application, &status, 0));
		t->application = 0;
		if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
			exit(3);
		return 0;
	}
	if (get(t->read_report, &r, sizeof r) == is(t->event, "exec"))
		exit(3);
	return r.kind == 'X' ? (int)r.frame : 0;
}

/* Until the card is idle, as told by whoever may look at it. Returns whether the living
 * application found the card's data in its memory. */
static int await_quiet(struct trial *t)
{
	struct report r;
	if (!t->application || is(t->event, "exec")) {
		if (!t->bar) { /* the application alone had the card, and is gone */
			pci_command(t->bdf, 2);
			t->bar = sysfs_bar(t->bdf);
		}
		await_idle(t->bar);
		return 0;
	}
	need(t->read_report, &r, sizeof r);
	return r.arrived;
}

static void clean_up(struct trial *t, pid_t application)
{
	char path[64];
	if (t->application)
		kill(t->application, SIGKILL);
	if (t->ghost)
		kill(t->ghost, SIGKILL); /* not reaped yet, so the number is still its own */
	close(t->go);
	while (waitpid(-1, NULL, 0) > 0)
		;
	snprintf(path, sizeof path, "/sys/fs/cgroup/trial-%d", application);
	rmdir(path);
}

/* Runs the trial and prints what was seen, as one line of JSON. */
static int judge(struct trial *t, const struct strategy *s)
{
	struct report rung, over;
	struct answer a;
	pid_t application;

	if (!s->tenancy && !is(t->event, "fork") && !start_process())
		innocent(t, s, NULL);
	if (s->keeper)
		s->keeper(t);
	if (s->tenancy && !start_process()) /* a tenant of the same keeper: inherits its container */
		innocent(t, s, NULL);
	application = t->application = start_process();
	if (!application) {
		get_ready(t);
		s->application(t);
		_exit(3);
	}
	close(t->report);
	if (!get(t->read_report, &rung, sizeof rung)) {
		int status; /* the application could not play its part; it has said why */
		MUST(waitpid(application, &status, 0));
		exit(WIFEXITED(status) ? WEXITSTATUS(status) : 3);
	}
	t->ghost = rung.ghost;
	int refused = await_event(t);
	if (s->aftermath)
		s->aftermath(t);
	over.at = now();
	put(t->go, &rung, sizeof rung);
	need(t->read_answer, &a, sizeof a);
	int arrived = await_quiet(t);
	put(t->go, &rung, sizeof rung);
	need(t->read_answer, &a, sizeof a);
	if (s->arrived)
		arrived |= s->arrived(t);
	printf("{\"in_time\": %d, \"got_frame\": %d, \"foreign_words\": %d, \"stamped\": %d, ",
	       a.filled - rung.at < WINDOW_MS && a.pages >= ENOUGH, a.got, a.foreign, a.stamped);
	printf("\"pages\": %d, \"arrived\": %d, \"stuck\": %d, \"refused\": %d, ",
	       a.pages, arrived, t->stuck, refused);
	printf("\"event_ms\": %.1f, \"filled_ms\": %.1f}\n", over.at - rung.at, a.filled - rung.at);
	clean_up(t, application);
	return 0;
}

#endif

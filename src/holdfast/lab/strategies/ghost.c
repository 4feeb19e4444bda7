/* SPDX-License-Identifier: Apache-2.0 */
/* Strategy: a ghost that shares the address space, as proposed in 1998.
 *
 * clone(CLONE_VM) without CLONE_THREAD: a process of its own, so that a SIGKILL of the application
 * spares it, and one more user of the same mm, so that the mm outlives the application (exit_mm
 * drops one reference; the pages go with the last one, mmput in kernel/fork.c). It watches
 * the card and goes when the card is idle. What it cannot stop is the application, or the system,
 * changing the shared address space: munmap, madvise, copy on write, the OOM killer.
 *
 * Variant "files": the ghost shares the descriptors as well (as a kernel thread of the 1990s did)
 * and waits for "release", the last close of the application's device file. Its own share is what
 * keeps that close from coming. The device file is played by the write end of a pipe: the
 * hang-up of a pipe is its release.
 */
#include "trial.h"
#include <poll.h>

static int device_file, sees_release;

static int released(int timeout)
{
	struct pollfd p = {sees_release, 0, 0};
	return MUST(poll(&p, 1, timeout)) == 1 && p.revents & POLLHUP;
}

static void keeper(struct trial *t)
{
	int fds[2];
	prime_physical(t);
	MUST(pipe2(fds, O_CLOEXEC));
	sees_release = fds[0];
	device_file = fds[1];
}

static int ghost(void *trial)
{
	struct trial *t = trial;
	if (is(t->variant, "files")) {
		released(-1);
	} else { /* its own table of descriptors: it keeps none of the application's */
		close(device_file);
		close(t->report);
	}
	while (!t->rung)
		nap();
	await_idle(t->bar);
	return 0;
}

static void application(struct trial *t)
{
	char *memory = private_memory(region(t));
	char *stack = private_memory(HUGE);
	int flags = CLONE_VM | SIGCHLD | (is(t->variant, "files") ? CLONE_FILES : 0);

	MUST(mlock(memory, region(t)));
	pid_t child = MUST(clone(ghost, stack + HUGE, flags, t));
	ring(t, target(t, memory), frame_of(target(t, memory)) * PAGE, child);
	undergo(t, memory, region(t));
}

static void aftermath(struct trial *t)
{
	(void)t;
	close(device_file); /* the harness's own copy */
}

/* The card is idle. Has the release come? If not: does it come when the ghost is killed? */
static int release_seen(struct trial *t)
{
	if (!is(t->event, "kill"))
		return 0;
	t->stuck = !released(300);
	MUST(kill(t->ghost, SIGKILL));
	if (!released(5000))
		exit(3);
	return 0;
}

int main(int argc, char **argv)
{
	struct trial t = begin(argc, argv);
	struct strategy shares_mm = {.keeper = keeper, .application = application,
				     .aftermath = aftermath, .arrived = release_seen};
	return judge(&t, &shares_mm);
}

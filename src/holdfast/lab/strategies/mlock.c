/* SPDX-License-Identifier: Apache-2.0 */
/* Strategy: mlock only. The application's own page, locked, its physical address from pagemap.
 *
 * mlock promises that the page stays present in *this* address space while it is mapped there. It
 * promises nothing to a card: every way of losing the mapping gives the frame away, and the
 * kernel may move the contents to another frame at any time. This is the bug of 1998.
 */
#include "trial.h"

static void application(struct trial *t)
{
	char *memory = private_memory(region(t));
	MUST(mlock(memory, region(t)));
	ring(t, target(t, memory), frame_of(target(t, memory)) * PAGE, 0);
	undergo(t, memory, region(t));
}

int main(int argc, char **argv)
{
	struct trial t = begin(argc, argv);
	struct strategy mlock_only = {.keeper = prime_physical, .application = application};
	return judge(&t, &mlock_only);
}

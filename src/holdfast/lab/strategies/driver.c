/* SPDX-License-Identifier: Apache-2.0 */
/* Strategy: pages that a driver allocates and maps into the application.
 *
 * A mainline driver that does just this: packet sockets. The receive ring is allocated by
 * the kernel and mapped page by page (net/packet/af_packet.c: alloc_pg_vec, packet_mmap) and lives
 * as long as the socket. The mapping counts as a user of the file, so munmap and death end in
 * the order one wants: mapping first, release afterwards. What release then does is the driver's
 * business. This one frees its pages at once (packet_release, free_pg_vec): it knows
 * nothing of our card.
 *
 *   alone    the application alone holds the file
 *   keeper   another process holds it too, until the card is idle
 */
#include "trial.h"
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <sys/socket.h>

#define RING 64 /* pages */

static int file;
static char *kept;

/* The card's target. Frames for the kernel's own use are kept on lists of their own (mm/page_alloc.c,
 * migrate types), and what is freed last goes first, to whatever the kernel needs: a page table,
 * a slab. A page from the middle of a ring of many leaves the kernel enough of the others. With a
 * ring of one page it was the kernel that was overwritten, and the machine went down. */
static char *middle(char *ring_memory) { return ring_memory + RING / 4 * PAGE; }

static int driver_file(size_t pages)
{
	struct tpacket_req request = {PAGE, pages, PAGE, pages};
	int s = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
	if (s == -1)
		lacking("packet sockets");
	MUST(setsockopt(s, SOL_PACKET, PACKET_RX_RING, &request, sizeof request));
	return s;
}

static char *mapped(int f, size_t pages)
{
	return (char *)MUST(mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0));
}

/* The innocent is another user of the same driver: it takes from the same lists. */
static char *take_from_driver(size_t pages) { return mapped(driver_file(pages), pages); }

static void keeper(struct trial *t)
{
	prime_physical(t);
	write_text("/sys/kernel/rcu_expedited", "1"); /* the ring's set-up waits for grace periods */
	if (is(t->variant, "keeper")) {
		file = driver_file(RING);
		kept = mapped(file, RING);
	}
}

static void application(struct trial *t)
{
	if (is(t->variant, "alone"))
		file = driver_file(RING);
	char *memory = mapped(file, RING);
	ring(t, middle(memory), frame_of(middle(memory)) * PAGE, 0);
	undergo(t, memory, RING * PAGE);
}

static int arrived(struct trial *t)
{
	return kept && has_stamp((uint32_t *)middle(kept), t->stamp);
}

int main(int argc, char **argv)
{
	struct trial t = begin(argc, argv);
	struct strategy driver_owned = {.keeper = keeper, .application = application,
					.arrived = arrived, .take = take_from_driver};
	return judge(&t, &driver_owned);
}

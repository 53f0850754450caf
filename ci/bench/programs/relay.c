/*
 * relay LISTEN-PORT TO-PORT MICROSECONDS: passes TCP connections on, between loopback ports, and holds back every
 * byte for MICROSECONDS in each direction. Up to 64 MiB are held in each: the way is long, not narrow.
 * Prints "ready" when it listens; ends with its standard input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 128 << 10, SLOTS = 4096, HELD = 64 << 20 };

struct piece {
	char *data;
	size_t size, sent;
	long due;
};

/* What is on its way in one direction. */
struct way {
	struct piece pieces[SLOTS];
	size_t head, tail, bytes;
	int ended, closed;
};

static in_port_t to_port;
static long delay;

static long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int has_room(const struct way *way)
{
	return !way->ended && way->bytes < HELD && way->tail - way->head < SLOTS;
}

static void take(struct way *way, int from)
{
	static _Thread_local char buffer[PIECE];
	ssize_t count = read(from, buffer, sizeof buffer);
	if (count < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (count <= 0) {
		way->ended = 1;
		return;
	}
	struct piece *piece = &way->pieces[way->tail++ % SLOTS];
	*piece = (struct piece){malloc((size_t)count), (size_t)count, 0, now() + delay};
	if (!piece->data)
		abort();
	for (ssize_t i = 0; i < count; i++)
		piece->data[i] = buffer[i];
	way->bytes += (size_t)count;
}

static void give(struct way *way, int to)
{
	while (way->head != way->tail) {
		struct piece *piece = &way->pieces[way->head % SLOTS];
		if (piece->due > now())
			return;
		ssize_t count = send(to, piece->data + piece->sent, piece->size - piece->sent, MSG_NOSIGNAL);
		if (count < 0) {
			if (errno == EAGAIN || errno == EINTR)
				return;
			count = (ssize_t)(piece->size - piece->sent); /* nobody listens any more */
			way->ended = 1;
		}
		piece->sent += (size_t)count;
		way->bytes -= (size_t)count;
		if (piece->sent < piece->size)
			return;
		free(piece->data);
		way->head++;
	}
	if (way->ended && !way->closed) {
		way->closed = 1;
		shutdown(to, SHUT_WR);
	}
}

static void *pass_on(void *argument)
{
	int ends[2] = {(int)(long)argument, socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
	struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons(to_port)};
	there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	struct way *ways = calloc(2, sizeof *ways);
	if (ways && connect(ends[1], (struct sockaddr *)&there, sizeof there) == 0) {
		for (int i = 0; i < 2; i++) {
			int one = 1;
			setsockopt(ends[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
			fcntl(ends[i], F_SETFL, O_NONBLOCK);
		}
		while (!ways[0].closed || !ways[1].closed) {
			struct pollfd polled[2] = {{ends[0], 0, 0}, {ends[1], 0, 0}};
			long wait = 1000000000L;
			for (int i = 0; i < 2; i++) {
				if (has_room(&ways[i]))
					polled[i].events |= POLLIN;
				if (ways[i].head == ways[i].tail)
					continue;
				long left = ways[i].pieces[ways[i].head % SLOTS].due - now();
				if (left <= 0)
					polled[1 - i].events |= POLLOUT;
				else if (left < wait)
					wait = left;
			}
			struct timespec time = {wait / 1000000000L, wait % 1000000000L};
			if (!polled[0].events)
				polled[0].fd = -1; /* or its end would wake us without end */
			if (!polled[1].events)
				polled[1].fd = -1;
			if (ppoll(polled, 2, &time, NULL) < 0 && errno != EINTR)
				break;
			for (int i = 0; i < 2; i++) {
				if (polled[i].revents & (POLLIN | POLLHUP | POLLERR) && has_room(&ways[i]))
					take(&ways[i], ends[i]);
				give(&ways[i], ends[1 - i]);
			}
		}
	}
	close(ends[0]);
	close(ends[1]);
	free(ways);
	return NULL;
}

static void *end_with_stdin(void *unused)
{
	char byte;
	while (read(STDIN_FILENO, &byte, 1) > 0)
		;
	exit(0);
	return unused;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: relay LISTEN-PORT TO-PORT MICROSECONDS\n");
		return 2;
	}
	to_port = (in_port_t)atoi(argv[2]);
	delay = atol(argv[3]) * 1000;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(argv[1]))};
	here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 64)) {
		perror("relay");
		return 1;
	}
	pthread_t thread;
	pthread_create(&thread, NULL, end_with_stdin, NULL);
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (connection >= 0 && pthread_create(&thread, NULL, pass_on, (void *)(long)connection) == 0)
			pthread_detach(thread);
	}
}

/* The limit: one loop in C that only calls send(). Every reader gets every event, as one
 * HTTP chunk, straight from a timer; no parsing, no log, no buffering, no fault handled.
 *
 *   limit PORT RATE */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX = 20000 };
static int readers[MAX], count;
static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                           "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";

static void leave(int fd) {
    int i = 0;
    while (i < count && readers[i] != fd) i++;
    if (i < count) readers[i] = readers[--count];
    close(fd);
}

static void tick(void) {
    char event[128], chunk[160];
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int n = sprintf(event, "data: {\"content\": \"@%018lld \"}\n\n",
                    t.tv_sec * 1000000000LL + t.tv_nsec);
    n = sprintf(chunk, "%x\r\n%s\r\n", n, event);
    for (int i = 0; i < count; i++)
        if (send(readers[i], chunk, n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN)
            close(readers[i]), readers[i--] = readers[--count];
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    int listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 1024)) return perror("bind"), 1;
    double rate = atof(argv[2]);
    long gap = rate > 0 ? (long)(1e9 / rate) : 0;
    struct timespec every = {gap / 1000000000, gap % 1000000000};
    timerfd_settime(timer, 0, &(struct itimerspec){every, every}, 0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &(struct epoll_event){EPOLLIN, {.fd = listener}});
    epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &(struct epoll_event){EPOLLIN, {.fd = timer}});
    for (;;) {
        struct epoll_event events[64];
        char data[4096];
        int n = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            long ticks;
            if (fd == timer) {
                if (read(timer, &ticks, sizeof ticks) > 0)
                    for (ticks = ticks > 4 ? 4 : ticks; ticks-- > 0;) tick();
            } else if (fd == listener) {
                fd = accept(listener, 0, 0);
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
                epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){EPOLLIN, {.fd = fd}});
            } else if (recv(fd, data, sizeof data, 0) <= 0) {
                leave(fd);
            } else if (count < MAX) { /* its request: one segment, not even looked at */
                send(fd, HEAD, sizeof HEAD - 1, MSG_NOSIGNAL);
                readers[count++] = fd;
            }
        }
    }
}

/* The upstream: an OpenAI-compatible model that answers each POST with RATE tokens a second,
 * for ever, each with the time at which it was sent: `@` and 18 digits of CLOCK_MONOTONIC
 * in ns. The answers' phases are spread evenly, as those of real ones are.
 *
 *   upstream PORT RATE */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { MAX = 4096 };
static int64_t due[MAX]; /* by file descriptor; 0: not asked yet */
static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                           "Transfer-Encoding: chunked\r\n\r\n";

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int token(int fd) {
    char event[512], chunk[600];
    int n = sprintf(event, "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\","
                    "\"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":"
                    "{\"content\":\"@%018lld \"},\"finish_reason\":null}]}\n\n", (long long)now_ns());
    n = sprintf(chunk, "%x\r\n%s\r\n", n, event);
    return send(fd, chunk, n, MSG_NOSIGNAL) == n;
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    int64_t gap = (int64_t)(1e9 / atof(argv[2])), phase = 0;
    int listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0), top = 0;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 1024)) return perror("bind"), 1;
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &(struct epoll_event){EPOLLIN, {.fd = listener}});
    for (;;) {
        int64_t now = now_ns(), next = now + 1000000000;
        for (int fd = 0; fd <= top; fd++) {
            if (!due[fd]) continue;
            if (due[fd] <= now) {
                if (!token(fd)) { due[fd] = 0; close(fd); continue; }
                due[fd] += gap;
            }
            if (due[fd] < next) next = due[fd];
        }
        int64_t wait = next - now_ns();
        struct timespec timeout = {wait > 0 ? wait / 1000000000 : 0, wait > 0 ? wait % 1000000000 : 0};
        struct epoll_event events[64];
        int n = epoll_pwait2(epoll, events, 64, &timeout, NULL);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            char request[65536];
            if (fd == listener) {
                fd = accept(listener, 0, 0);
                if (fd < 0 || fd >= MAX) { if (fd >= 0) close(fd); continue; }
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
                epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){EPOLLIN, {.fd = fd}});
                if (fd > top) top = fd;
            } else if (recv(fd, request, sizeof request, 0) <= 0) {
                due[fd] = 0, close(fd);
            } else if (!due[fd]) { /* the whole of the request is one segment here */
                send(fd, HEAD, sizeof HEAD - 1, MSG_NOSIGNAL);
                phase = (phase + gap * 618 / 1000) % gap; /* golden ratio: evenly spread */
                due[fd] = now_ns() + phase + 1;
            }
        }
    }
}

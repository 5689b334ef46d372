/* The upstream: an OpenAI-compatible model that answers each POST with RATE tokens a second,
 * for ever, each of 150 bytes and with the time at which it was sent: `@` and 18 digits of
 * CLOCK_MONOTONIC in ns. The answers' phases are spread evenly, as those of real ones are.
 * At RATE 0 one token comes, and nothing after it.
 *
 *   upstream PORT RATE [CERTIFICATE KEY]   with these, over TLS */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/ssl.h>
#endif

enum { MAX = 4096 };
static const int64_t NEVER = 1000000000000000000; /* 30 years, in ns */
static int64_t due[MAX]; /* by file descriptor; 0: not asked yet */
static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                           "Transfer-Encoding: chunked\r\n\r\n";

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Each call may block: the server under test reads all that comes. */
#ifdef TLS
static SSL_CTX *context;
static SSL *sessions[MAX];

static int start_tls(const char *certificate, const char *key) {
    context = SSL_CTX_new(TLS_server_method());
    return SSL_CTX_use_certificate_chain_file(context, certificate) == 1 &&
           SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) == 1;
}

static int open_session(int fd) {
    if (!context) return 1;
    SSL_set_fd(sessions[fd] = SSL_new(context), fd);
    return SSL_accept(sessions[fd]) == 1;
}

static int transmit(int fd, const char *data, int size) {
    return context ? SSL_write(sessions[fd], data, size) == size
                   : send(fd, data, size, MSG_NOSIGNAL) == size;
}

static int receive(int fd, char *data, int size) {
    return context ? SSL_read(sessions[fd], data, size) : (int)recv(fd, data, size, 0);
}

static void end_session(int fd) {
    SSL_free(sessions[fd]);
    sessions[fd] = 0;
    close(fd);
}
#else
static int start_tls(const char *certificate, const char *key) {
    return (void)certificate, (void)key, 0;
}

static int open_session(int fd) { return fd >= 0; }

static int transmit(int fd, const char *data, int size) {
    return send(fd, data, size, MSG_NOSIGNAL) == size;
}

static int receive(int fd, char *data, int size) { return (int)recv(fd, data, size, 0); }

static void end_session(int fd) { close(fd); }
#endif

static int token(int fd) {
    char event[512], chunk[600];
    int n = sprintf(event, "data: {\"id\":\"load\",\"object\":\"chat.completion.chunk\","
                    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":"
                    "{\"content\":\"@%018lld \"},\"finish_reason\":null}]}\n\n",
                    (long long)now_ns());
    n = sprintf(chunk, "%x\r\n%s\r\n", n, event);
    return transmit(fd, chunk, n);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    if (argc > 4 && !start_tls(argv[3], argv[4])) return fprintf(stderr, "no TLS\n"), 1;
    signal(SIGPIPE, SIG_IGN);
    double rate = atof(argv[2]);
    int64_t gap = rate ? (int64_t)(1e9 / rate) : NEVER, phase = 0;
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
                if (!token(fd)) { due[fd] = 0, end_session(fd); continue; }
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
                if (!open_session(fd)) { end_session(fd); continue; }
                epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){EPOLLIN, {.fd = fd}});
                if (fd > top) top = fd;
            } else if (receive(fd, request, sizeof request) <= 0) {
                due[fd] = 0, end_session(fd);
            } else if (!due[fd]) { /* the whole of the request is one segment here */
                transmit(fd, HEAD, sizeof HEAD - 1);
                if (rate) phase = (phase + gap * 618 / 1000) % gap; /* golden ratio: evenly spread */
                due[fd] = now_ns() + phase + 1;
            }
        }
    }
}

/* The load: N connections in one epoll loop, and nothing per delivery but a memchr.
 *
 *   load sse    PORT PATH N WARM SECS [BODY [follow]]   N GETs, or N POSTs of BODY; with
 *                                       `follow` one POST, and N-1 GET /answers/{id}
 *   load ws     PORT PATH N WARM SECS INFLIGHT          a room: INFLIGHT messages under way
 *   load accept PORT PATH N WARM SECS                   N at a time: GET, first bytes, close
 *
 * Events carry "@" and 18 digits of CLOCK_MONOTONIC in ns. In a room four more follow: the
 * message's number among those under way; it is, until its sender has it back.
 * `begin` and `end` are printed around the window that is measured, so that the caller can
 * read the server's CPU time at both, then one line of JSON.
 * SECS 0: connect, print `begin`, and hold the connections until killed. */
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
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { MAX = 20000, BATCH = 512, DIGITS = 18 };
typedef struct {
    int fd, up, want, got; /* digits wanted and got of the stamp being read */
    char digits[24];
} Conn;

static Conn conns[MAX];
static int epoll, port, count, ups, lost, is_ws, is_accept, measuring;
static int sender[10000];  /* of each message under way */
static int64_t sent[10000]; /* and when */
static const char *path, *body;
static char answer[256]; /* path of the answer to follow, from the id of its first event */
static uint32_t histogram[64 * 128];
static long delivered;

static int64_t clock_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* 64 buckets for each doubling: within 2 % of the truth. */
static int bucket(uint64_t us) {
    int e = 63 - __builtin_clzll(us | 127) - 6;
    return e * 128 + (int)(us >> e);
}
static double percentile(double share) {
    long left = (long)(share * delivered);
    for (int b = 0; b < 64 * 128; b++)
        if ((left -= histogram[b]) < 0) {
            return (double)((uint64_t)(b % 128) << b / 128) / 1000.0;
        }
    return 0;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void transmit(Conn *c, const char *data, int size) {
    if (send(c->fd, data, size, MSG_NOSIGNAL) != size) die("send");
}

/* Of the messages under way, number `slot`, each time from another member: where it stands
 * in the server's loop must not matter. Masked with the key 0000: legal, and readable. */
static void say(int slot) {
    static unsigned said;
    char frame[64];
    sent[slot] = clock_ns(CLOCK_MONOTONIC);
    int n = sprintf(frame + 6, "@%018lld%04d", (long long)sent[slot], slot);
    memcpy(frame, (char[]){(char)0x81, (char)(0x80 | n), 0, 0, 0, 0}, 6);
    sender[slot] = ++said * 89 % count;
    transmit(&conns[sender[slot]], frame, 6 + n);
}

static void open_connection(int i) {
    char head[2048];
    Conn *c = &conns[i];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *c = (Conn){.fd = socket(AF_INET, SOCK_STREAM, 0)};
    if (c->fd < 0) die("socket");
    if (connect(c->fd, (void *)&to, sizeof to)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    int post = body && !answer[0];
    int n = sprintf(head, "%s %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n", post ? "POST" : "GET",
                    answer[0] ? answer : path, port);
    if (is_ws)
        n += sprintf(head + n, "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n");
    if (post)
        n += sprintf(head + n, "Content-Type: application/json\r\n"
                     "Content-Length: %zu\r\n", strlen(body));
    n += sprintf(head + n, "\r\n%s", post ? body : "");
    transmit(c, head, n);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {EPOLLIN, {.u32 = i}};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
}

static void stamp(Conn *c, int64_t now) {
    int slot = is_ws ? atoi(c->digits + DIGITS) : -1;
    c->digits[DIGITS] = 0;
    int64_t at = atoll(c->digits), age = now - at;
    if (measuring) {
        delivered++;
        histogram[bucket(age > 0 ? age / 1000 : 0)]++;
    }
    int echo = slot >= 0 && sender[slot] == c - conns && sent[slot] == at;
    if (echo) say(slot);
}

/* A stamp may be cut anywhere by a read: its digits are kept until they are complete. */
static void scan(Conn *c, const char *at, const char *end, int64_t now) {
    while (at < end) {
        if (!c->want) {
            if (!(at = memchr(at, '@', end - at))) return;
            at++, c->want = DIGITS + (is_ws ? 4 : 0), c->got = 0;
        }
        while (at < end && c->got < c->want && *at >= '0' && *at <= '9')
            c->digits[c->got++] = *at++;
        if (c->got < c->want && at == end) return;
        c->digits[c->got] = 0;
        if (c->got == c->want) stamp(c, now);
        c->want = 0;
    }
}

static void first_bytes(Conn *c, char *data) {
    if (strncmp(data, is_ws ? "HTTP/1.1 101" : "HTTP/1.1 200", 12)) {
        fprintf(stderr, "load: refused: %.300s\n", data);
        exit(1);
    }
    c->up = 1, ups++;
    if (is_accept) delivered += measuring, close(c->fd), c->fd = -1;
}

static void learn_answer(char *data) {
    char *id = strstr(data, "\nid: ");
    char *dash = id ? strrchr(strtok(id += 5, "\r\n"), '-') : 0;
    if (dash) sprintf(answer, "/answers/%.*s", (int)(dash - id), id);
}

static void serve(int timeout_ms, int want_answer) {
    static char data[1 << 18];
    struct epoll_event events[BATCH];
    int n = epoll_wait(epoll, events, BATCH, timeout_ms);
    for (int i = 0; i < n; i++) {
        Conn *c = &conns[events[i].data.u32];
        ssize_t size = recv(c->fd, data, sizeof data - 1, 0);
        if (size <= 0) {
            if (size < 0 && errno == EAGAIN) continue;
            lost++, close(c->fd), c->fd = -1;
            if (!c->up) die("closed before it answered");
            continue;
        }
        data[size] = 0;
        if (!c->up) first_bytes(c, data);
        if (is_accept) { open_connection(c - conns); continue; }
        scan(c, data, data + size, clock_ns(CLOCK_MONOTONIC));
        if (want_answer) learn_answer(data);
    }
}

static void run_for(double seconds) {
    int64_t end = clock_ns(CLOCK_MONOTONIC) + (int64_t)(seconds * 1e9), left;
    while ((left = end - clock_ns(CLOCK_MONOTONIC)) > 0) serve((int)(left / 1000000) + 1, 0);
}

int main(int argc, char **argv) {
    if (argc < 7) return fprintf(stderr, "see the top of load.c\n"), 2;
    is_ws = !strcmp(argv[1], "ws"), is_accept = !strcmp(argv[1], "accept");
    port = atoi(argv[2]), path = argv[3], count = atoi(argv[4]);
    double warm = atof(argv[5]), secs = atof(argv[6]);
    int inflight = is_ws && argc > 7 ? atoi(argv[7]) : 0;
    if (!is_ws && argc > 7) body = argv[7];
    int follow = argc > 8;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epoll = epoll_create1(0);
    setvbuf(stdout, 0, _IOLBF, 0);

    for (int i = 0; i < count; i++) { /* at most 64 unanswered: no backlog overflows */
        open_connection(i);
        if (follow && i == 0)
            while (!answer[0] && !lost) serve(1000, 1);
        while (!is_accept && i + 1 - ups >= 64) serve(1000, 0);
    }
    while (!is_accept && ups < count) serve(1000, 0);
    if (lost) die("connections were lost");
    for (int i = 0; i < inflight; i++) say(i);
    run_for(warm);
    puts("begin");
    while (secs == 0) serve(1000, 0);
    measuring = 1;
    int64_t wall = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    run_for(secs);
    puts("end");
    wall = clock_ns(CLOCK_MONOTONIC) - wall, cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("{\"delivered\": %ld, \"seconds\": %.4f, \"p50_ms\": %.3f, \"p99_ms\": %.3f, "
           "\"load_cpu\": %.3f, \"lost\": %d}\n", delivered, wall / 1e9,
           percentile(.5), percentile(.99), (double)cpu / wall, lost);
}

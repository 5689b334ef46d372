/* The load: N readers in one epoll loop, and nothing per delivery but a memchr.
 *
 *   load [-s | -2 STREAMS] MODE PORT PATH N WARM SECS [MORE]
 *
 *   sse     [BODY [follow]]  N GETs, or N POSTs of BODY; with `follow` one POST, and
 *                            N-1 GET /answers/{id}
 *   ws      [INFLIGHT]       a room: INFLIGHT messages under way
 *   accept                   N at a time: GET, first bytes, close
 *   restart                  after WARM, N GETs at once, until each has had an event
 *
 * -s speaks TLS, -2 speaks HTTP/2 over TLS with STREAMS readers in each connection.
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
#ifdef TLS
#include <openssl/ssl.h>
#else /* built without OpenSSL: the benchmark leaves out what needs it */
typedef void SSL;
#endif

enum { MAX = 20000, BATCH = 512, DIGITS = 18, FRAME_HEAD = 9 };
enum { DATA = 0, HEADERS = 1, RESET = 3, SETTINGS = 4, PING = 6, GOAWAY = 7, WINDOW = 8 };
typedef struct {
    int fd, ready; /* ready: the request may be sent */
    SSL *ssl;
    int got, left; /* HTTP/2: how much of a frame's head is here, what its payload lacks */
    unsigned char frame[FRAME_HEAD + 8]; /* that head, and the payload of a ping */
} Conn;
typedef struct {
    int up, served, want, got; /* digits wanted and got of the stamp being read */
    char digits[24];
} Reader;

static Conn conns[MAX];
static Reader readers[MAX];
static int epoll, port, count, ups, lost, measuring, tls, streams;
static int is_ws, is_accept, is_restart;
static int sender[10000];   /* of each message under way */
static int64_t sent[10000]; /* and when */
static int64_t started;     /* restart: when the first of them came back */
static const char *path, *body;
static char answer[256]; /* path of the answer to follow, from the id of its first event */
static uint32_t histogram[64 * 128];
static long delivered;

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t clock_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* ---------------------------------------------------------------- delays */

/* 64 buckets for each doubling: within 2 % of the truth. */
static int bucket(uint64_t us) {
    int e = 63 - __builtin_clzll(us | 127) - 6;
    return e * 128 + (int)(us >> e);
}

static void record(int64_t age) {
    delivered++;
    histogram[bucket(age > 0 ? age / 1000 : 0)]++;
}

static double percentile(double share) {
    long left = (long)(share * delivered);
    for (int b = 0; b < 64 * 128; b++)
        if ((left -= histogram[b]) < 0) {
            return (double)((uint64_t)(b % 128) << b / 128) / 1000.0;
        }
    return 0;
}

/* ----------------------------------------------------- bytes, plain or TLS */

#ifdef TLS
static SSL_CTX *context;

static void start_tls(void) {
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_read_ahead(context, 1); /* as much as there is with one recv() */
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
    if (streams) SSL_CTX_set_alpn_protos(context, (unsigned char *)"\2h2", 3);
}

static void shake_hands(Conn *c) {
    int result = SSL_connect(c->ssl);
    c->ready = result == 1;
    if (result != 1 && SSL_get_error(c->ssl, result) != SSL_ERROR_WANT_READ)
        die("no TLS handshake");
}

static void over_tls(Conn *c) {
    c->ssl = SSL_new(context);
    SSL_set_fd(c->ssl, c->fd);
    shake_hands(c);
}

static ssize_t receive(Conn *c, char *data, size_t size) {
    if (!c->ssl) return recv(c->fd, data, size, 0);
    int n = SSL_read(c->ssl, data, (int)size);
    if (n > 0) return n;
    errno = SSL_get_error(c->ssl, n) == SSL_ERROR_WANT_READ ? EAGAIN : ECONNRESET;
    return -1;
}

static int has_more(Conn *c) { return c->ssl && SSL_has_pending(c->ssl); }

static void transmit(Conn *c, const char *data, int size) {
    int n = c->ssl ? SSL_write(c->ssl, data, size) : send(c->fd, data, size, MSG_NOSIGNAL);
    if (n != size) die("send");
}
#else
static void start_tls(void) { die("built without OpenSSL"); }
static void shake_hands(Conn *c) { (void)c; }
static void over_tls(Conn *c) { (void)c; }
static int has_more(Conn *c) { return (void)c, 0; }

static ssize_t receive(Conn *c, char *data, size_t size) {
    return recv(c->fd, data, size, 0);
}

static void transmit(Conn *c, const char *data, int size) {
    if (send(c->fd, data, size, MSG_NOSIGNAL) != size) die("send");
}
#endif

/* --------------------------------------------------------------- requests */

/* One frame of HTTP/2. */
static void frame(Conn *c, int type, int flags, int stream, const char *payload, int size) {
    char all[4096] = {(char)(size >> 16), (char)(size >> 8), (char)size, (char)type, (char)flags,
                      (char)(stream >> 24), (char)(stream >> 16), (char)(stream >> 8), (char)stream};
    memcpy(all + FRAME_HEAD, payload, size);
    transmit(c, all, FRAME_HEAD + size);
}

/* No window ever closes: 2 GiB for each stream, and for the connection. */
static void open_http2(Conn *c) {
    transmit(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24);
    frame(c, SETTINGS, 0, 0, "\0\2\0\0\0\0\0\4\x7f\xff\xff\xff", 12); /* and no push */
    frame(c, WINDOW, 0, 0, "\x7f\xff\0\0", 4);
}

/* HPACK without its tables: the static names, and values as they are. */
static char *literal(char *at, int name, const char *value) {
    if (name < 15) *at++ = (char)name;
    else *at++ = 15, *at++ = (char)(name - 15);
    *at++ = (char)strlen(value);
    return stpcpy(at, value);
}

static void ask_http2(int r, int post, const char *target) {
    char head[512], *at = head, length[24];
    Conn *c = &conns[r / streams];
    int stream = 2 * (r % streams) + 1;
    *at++ = (char)(post ? 0x83 : 0x82), *at++ = (char)0x87; /* :method, :scheme https */
    at = literal(literal(at, 4, target), 1, "localhost");   /* :path, :authority */
    if (post) {
        sprintf(length, "%zu", strlen(body));
        at = literal(literal(at, 31, "application/json"), 28, length);
    }
    frame(c, HEADERS, post ? 4 : 5, stream, head, (int)(at - head));
    if (post) frame(c, DATA, 1, stream, body, (int)strlen(body));
}

static void ask(int r) {
    char head[2048];
    int post = body && !answer[0];
    const char *target = answer[0] ? answer : path;
    if (streams) return ask_http2(r, post, target);
    int n = sprintf(head, "%s %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n", post ? "POST" : "GET",
                    target, port);
    if (is_ws)
        n += sprintf(head + n, "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n");
    if (is_restart) /* they have missed one event of a clock; other servers do not look */
        n += sprintf(head + n, "Last-Event-ID: clock-%lld\r\n",
                     (long long)(clock_ns(CLOCK_REALTIME) / 1000000000 - 1));
    if (post)
        n += sprintf(head + n, "Content-Type: application/json\r\n"
                     "Content-Length: %zu\r\n", strlen(body));
    n += sprintf(head + n, "\r\n%s", post ? body : "");
    transmit(&conns[r], head, n);
}

static void open_connection(int i) {
    Conn *c = &conns[i];
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *c = (Conn){.fd = socket(AF_INET, SOCK_STREAM, 0), .ready = !tls};
    if (c->fd < 0) die("socket");
    if (connect(c->fd, (void *)&to, sizeof to)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {EPOLLIN, {.u32 = i}};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
    if (tls) over_tls(c);
    else readers[i] = (Reader){0}, ask(i);
}

/* ---------------------------------------------------------------- events */

/* Of the messages under way, number `slot`, each time from another member: where it stands
 * in the server's loop must not matter. Masked with the key 0000: legal, and readable. */
static void say(int slot) {
    static unsigned said;
    char message[64];
    sent[slot] = clock_ns(CLOCK_MONOTONIC);
    int n = sprintf(message + 6, "@%018lld%04d", (long long)sent[slot], slot);
    memcpy(message, (char[]){(char)0x81, (char)(0x80 | n), 0, 0, 0, 0}, 6);
    sender[slot] = ++said * 89 % count;
    transmit(&conns[sender[slot]], message, 6 + n);
}

static void stamp(Reader *r, int64_t now) {
    int slot = is_ws ? atoi(r->digits + DIGITS) : -1;
    r->digits[DIGITS] = 0;
    int64_t at = atoll(r->digits);
    if (measuring) record(now - at);
    int echo = slot >= 0 && sender[slot] == r - readers && sent[slot] == at;
    if (echo) say(slot);
}

/* A stamp may be cut anywhere by a read: its digits are kept until they are complete. */
static void scan(Reader *r, const char *at, const char *end, int64_t now) {
    while (at < end) {
        if (!r->want) {
            if (!(at = memchr(at, '@', end - at))) return;
            at++, r->want = DIGITS + (is_ws ? 4 : 0), r->got = 0;
        }
        while (at < end && r->got < r->want && *at >= '0' && *at <= '9')
            r->digits[r->got++] = *at++;
        if (r->got < r->want && at == end) return;
        r->digits[r->got] = 0;
        if (r->got == r->want) stamp(r, now);
        r->want = 0;
    }
}

/* From an event's id `<answer>-<n>`, or from the bare `<answer>` that comes first. */
static void learn_answer(const char *data) {
    const char *id = strstr(data, "\nid: ");
    if (id) sprintf(answer, "/answers/%.*s", (int)strcspn(id + 5, "-\r\n"), id + 5);
}

static void first_event(Reader *r, const char *data, ssize_t size, int64_t now) {
    if (r->served || !memmem(data, size, "data:", 5)) return;
    r->served = 1, record(now - started);
}

static void body_of(int r, char *data, ssize_t size, int want_answer) {
    int64_t now = clock_ns(CLOCK_MONOTONIC);
    if (is_restart) return first_event(&readers[r], data, size, now);
    scan(&readers[r], data, data + size, now);
    if (!want_answer) return;
    char kept = data[size];
    data[size] = 0, learn_answer(data), data[size] = kept;
}

static void refused(const char *data) {
    fprintf(stderr, "load: refused: %.300s\n", data);
    exit(1);
}

static void first_bytes(int r, char *data) {
    if (strncmp(data, is_ws ? "HTTP/1.1 101" : "HTTP/1.1 200", 12)) refused(data);
    readers[r].up = 1, ups++;
}

static void end_of_frame(Conn *c, int type) {
    int is_ack = c->frame[4] & 1;
    if (type == SETTINGS && !is_ack) frame(c, SETTINGS, 1, 0, "", 0);
    if (type == PING && !is_ack) frame(c, PING, 1, 0, (char *)c->frame + FRAME_HEAD, 8);
    if (type == RESET || type == GOAWAY) refused("the stream or connection was ended");
    c->got = 0;
}

/* Frames may be cut anywhere; of each, what is here is passed on at once. */
static void read_frames(Conn *c, char *at, char *end, int want_answer) {
    while (at < end) {
        unsigned char *head = c->frame;
        if (c->got < FRAME_HEAD) {
            head[c->got++] = (unsigned char)*at++;
            if (c->got < FRAME_HEAD) continue;
            c->left = head[0] << 16 | head[1] << 8 | head[2];
        }
        int type = head[3], size = c->left < end - at ? c->left : (int)(end - at);
        int r = (int)(c - conns) * streams + ((head[7] << 8 | head[8]) - 1) / 2;
        if (type == DATA && size) body_of(r, at, size, want_answer);
        if (type == HEADERS && size && !readers[r].up) { /* 0x88: `:status: 200` */
            if ((unsigned char)*at != 0x88) refused("not with 200");
            readers[r].up = 1, ups++;
        }
        for (int i = 0; i < size && type == PING; i++) head[c->got++] = (unsigned char)at[i];
        at += size, c->left -= size;
        if (!c->left) end_of_frame(c, type);
    }
}

static void came(Conn *c, char *data, ssize_t size, int want_answer) {
    int i = (int)(c - conns);
    if (streams) return read_frames(c, data, data + size, want_answer);
    if (!readers[i].up) data[size] = 0, first_bytes(i, data);
    if (is_accept) {
        delivered += measuring, close(c->fd);
        return open_connection(i);
    }
    body_of(i, data, size, want_answer);
}

static void read_from(Conn *c, int want_answer) {
    static char data[1 << 18];
    do {
        ssize_t size = receive(c, data, sizeof data - 1);
        if (size < 0 && errno == EAGAIN) return;
        if (size <= 0) {
            lost++, close(c->fd), c->fd = -1;
            if (!streams && !readers[c - conns].up) die("closed before it answered");
            return;
        }
        came(c, data, size, want_answer);
    } while (has_more(c));
}

static void serve(int timeout_ms, int want_answer) {
    struct epoll_event events[BATCH];
    int n = epoll_wait(epoll, events, BATCH, timeout_ms);
    for (int i = 0; i < n; i++) {
        Conn *c = &conns[events[i].data.u32];
        if (!c->ready) {
            shake_hands(c);
            if (!c->ready) continue;
            if (streams) open_http2(c);
            else ask((int)(c - conns));
            if (!has_more(c)) continue;
        }
        read_from(c, want_answer);
    }
}

static void run_for(double seconds) {
    int64_t end = clock_ns(CLOCK_MONOTONIC) + (int64_t)(seconds * 1e9), left;
    while ((left = end - clock_ns(CLOCK_MONOTONIC)) > 0) serve((int)(left / 1000000) + 1, 0);
}

/* ------------------------------------------------------------------ runs */

static void open_reader(int r) {
    if (!streams) return open_connection(r);
    Conn *c = &conns[r / streams];
    if (r % streams == 0) open_connection(r / streams);
    while (!c->ready) serve(1000, 0);
    ask(r);
}

/* Until no more than `unanswered` of the first N have no answer. */
static void wait_for_answers(int n, int unanswered) {
    static int64_t deadline;
    if (!deadline) deadline = clock_ns(CLOCK_MONOTONIC) + 60 * 1000000000LL;
    while (!is_accept && n - ups > unanswered) {
        serve(1000, 0);
        if (clock_ns(CLOCK_MONOTONIC) > deadline) errno = ETIMEDOUT, die("too busy to answer");
    }
}

static void connect_all(int follow) {
    for (int r = 0; r < count; r++) {
        open_reader(r);
        if (follow && r == 0)
            while (!answer[0] && !lost) serve(1000, 1);
        wait_for_answers(r + 1, 63); /* no backlog overflows */
    }
    wait_for_answers(count, 0);
    if (lost) die("connections were lost");
}

/* At most 1,000 without their event: the shortest backlog among the servers has 1,024
 * places, and a backlog that overflows would cost a second, whatever the server does. */
static void come_back(void) {
    started = clock_ns(CLOCK_MONOTONIC);
    for (int r = 0; r < count; r++) {
        open_connection(r);
        serve(0, 0);
        while (r + 1 - delivered >= 1000) serve(1000, 0);
    }
    while (delivered < count && !lost) serve(1000, 0);
    if (lost) die("connections were lost");
}

int main(int argc, char **argv) {
    for (int flag; (flag = getopt(argc, argv, "s2:")) != -1;)
        tls = 1, streams = flag == '2' ? atoi(optarg) : 0;
    argv += optind - 1, argc -= optind - 1;
    if (argc < 7) return fprintf(stderr, "see the top of load.c\n"), 2;
    is_ws = !strcmp(argv[1], "ws"), is_accept = !strcmp(argv[1], "accept");
    is_restart = !strcmp(argv[1], "restart");
    port = atoi(argv[2]), path = argv[3], count = atoi(argv[4]);
    double warm = atof(argv[5]), secs = atof(argv[6]);
    int inflight = is_ws && argc > 7 ? atoi(argv[7]) : 0;
    if (!is_ws && argc > 7) body = argv[7];
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    setvbuf(stdout, 0, _IOLBF, 0);
    if (tls) start_tls();

    if (!is_restart) connect_all(argc > 8);
    for (int i = 0; i < inflight; i++) say(i);
    run_for(warm);
    puts("begin");
    while (secs == 0) serve(1000, 0);
    measuring = 1;
    int64_t wall = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    if (is_restart) come_back();
    else run_for(secs);
    puts("end");
    wall = clock_ns(CLOCK_MONOTONIC) - wall, cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("{\"delivered\": %ld, \"seconds\": %.4f, \"p50_ms\": %.3f, \"p99_ms\": %.3f, "
           "\"load_cpu\": %.3f, \"lost\": %d}\n", delivered, wall / 1e9,
           percentile(.5), percentile(.99), (double)cpu / wall, lost);
}

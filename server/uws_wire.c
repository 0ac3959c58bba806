// What comes in on HTTP connections, put in order before uWebSockets' parser sees it. That parser is of 2023, and stands
// inside a library that cannot be changed. It answers what it does not know with silence, takes a chunk extension for a
// size, and cuts a request line wherever a packet ends.
//
// A read that holds one plain request goes through as it is, at the price of one look at its head. Of all else, the
// parser gets what it understands: whole heads, HTTP/1.1 with a Host, chunks without extensions and trailers. What has
// no meaning is refused here, at once and with a complete answer. Requests behind one that waits for its answer wait too.
//
// It takes the place of the handlers that uWebSockets gave its sockets, and calls those. Knows nothing of routes.

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "uws_wire.h"

typedef struct us_socket_t us_socket_t;
typedef struct us_socket_context_t us_socket_context_t;
typedef us_socket_t *(*on_open_t)(us_socket_t *s, int is_client, char *ip, int ip_length);
typedef us_socket_t *(*on_close_t)(us_socket_t *s, int code, void *reason);
typedef us_socket_t *(*on_data_t)(us_socket_t *s, char *data, int length);
typedef us_socket_t *(*on_writable_t)(us_socket_t *s);
typedef us_socket_t *(*on_end_t)(us_socket_t *s);

extern us_socket_context_t *us_socket_context(int ssl, us_socket_t *s);
extern void us_socket_context_on_open(int ssl, us_socket_context_t *context, on_open_t handler);
extern void us_socket_context_on_close(int ssl, us_socket_context_t *context, on_close_t handler);
extern void us_socket_context_on_data(int ssl, us_socket_context_t *context, on_data_t handler);
extern void us_socket_context_on_writable(int ssl, us_socket_context_t *context, on_writable_t handler);
extern void us_socket_context_on_end(int ssl, us_socket_context_t *context, on_end_t handler);
extern int us_poll_fd(void *poll);
extern int us_socket_is_closed(int ssl, us_socket_t *s);
extern int us_socket_is_shut_down(int ssl, us_socket_t *s);
extern int us_socket_write(int ssl, us_socket_t *s, const char *data, int length, int more);
extern void us_socket_shutdown(int ssl, us_socket_t *s);
extern us_socket_t *us_socket_close(int ssl, us_socket_t *s, int code, void *reason);
extern void us_socket_timeout(int ssl, us_socket_t *s, unsigned int seconds);
extern bool uws_res_has_responded(int ssl, void *res);
extern unsigned int uws_ws_get_buffered_amount(int ssl, void *ws);

enum { SSL = 0 };
enum { MAX_HEAD = 16384 };       // bytes of request line and header lines: as much as Node.js takes
enum { MAX_HEAD_LINES = 48 };    // that uWebSockets reads
enum { MAX_CHUNK_LINE = 4096 };  // bytes of a chunk's size and extensions
enum { MAX_WAITING = 65536 };    // bytes of requests behind one that waits for its answer
enum { AT_ONCE = 16 };           // requests of one connection before the loop goes on with others
enum { MAX_TARGET = 8192 };      // of server/uws.py: only to say 414 rather than 431
enum { PADDING = 64 };           // the parser writes and looks past what it is given
enum { ROOM_FOR_LINES = 64 };    // "Host:" and "Connection: close" where they are added
enum { BODY_S = 16 };            // 12 to 16 s for the next bytes of a body: BODY_TIMEOUT_S of server/uws.py comes first
enum { LINGER_S = 5 };           // a refused client has 4 to 8 s to read why: uSockets rounds up, and looks once in 4 s

// Where in a message the next byte stands.
enum mode { HEAD, BODY, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, REFUSED };

struct wire {
    us_socket_t *socket;
    enum mode mode;
    bool began;       // had a request: only before the first may PROXY stand
    bool half_closed; // its client sends no more, and waits for an answer
    bool resumes;     // stands in `resuming`
    bool more;        // the request that is being passed on is not the last of what came
    uint32_t left;    // bytes of the body or the chunk that are still to come; of trailers, those that came
    char *held;       // what came and could not be passed on yet
    size_t held_length;
};

struct refusal {
    int status, length;
    char *answer;
};

static struct wire *wires; // by descriptor
static int wires_made;
static us_socket_context_t *context;
static on_open_t next_open;
static on_close_t next_close;
static on_data_t next_data;
static on_writable_t next_writable;
static on_end_t next_end;
static int data_word; // where in a context its handler of incoming data stands
static struct refusal refusals[16];
static int refusals_known;
static int *resuming; // descriptors of connections whose held bytes may go on
static int resuming_count, resuming_room;
static void (*wake)(void);

static struct wire *wire_of(void *socket) { return &wires[us_poll_fd(socket)]; }

static void *must(void *memory) {
    if (!memory) abort();
    return memory;
}

static bool is_ours(us_socket_t *s) {
    return !us_socket_is_closed(SSL, s) && us_socket_context(SSL, s) == context && !us_socket_is_shut_down(SSL, s);
}

static bool is_websocket(us_socket_t *s) {
    return !us_socket_is_closed(SSL, s) && us_socket_context(SSL, s) != context && !us_socket_is_shut_down(SSL, s);
}

// ---------------------------------------------------------------- heads

enum verdict { PLAIN, REWRITE, PARTIAL }; // any other is a status to refuse with

struct head {
    size_t length; // with the empty line
    uint32_t body;
    bool has_coding, is_chunked, has_length, has_host, has_connection, is_old, closes;
    int lines;
    size_t method_length, target, target_length; // places in the head
    int verdict;
};

// Of a header's name: 1 for what uWebSockets reads, 2 for what RFC 9110 allows beside it. 0 is neither.
static const uint8_t NAME[256] = {
    ['!'] = 2, ['#'] = 2, ['$'] = 2, ['%'] = 2, ['&'] = 2, ['\''] = 2, ['*'] = 2, ['+'] = 2, ['.'] = 2, ['^'] = 2,
    ['_'] = 2, ['`'] = 2, ['|'] = 2, ['~'] = 2, ['-'] = 1, ['0' ... '9'] = 1, ['A' ... 'Z'] = 1, ['a' ... 'z'] = 1,
};

// Whether two texts are the same but for upper case; `lower` is in lower case.
static bool is(const char *text, size_t length, const char *lower) {
    if (strlen(lower) != length) return false;
    for (size_t i = 0; i < length; i++)
        if ((text[i] >= 'A' && text[i] <= 'Z' ? text[i] | 0x20 : text[i]) != lower[i]) return false;
    return true;
}

static bool has_token(const char *list, size_t length, const char *lower) {
    for (const char *end = list + length, *at = list; at <= end;) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        const char *stop = comma ? comma : end;
        const char *last = stop;
        while (at < last && (*at == ' ' || *at == '\t')) at++;
        while (last > at && (last[-1] == ' ' || last[-1] == '\t')) last--;
        if (is(at, (size_t)(last - at), lower)) return true;
        at = stop + 1;
    }
    return false;
}

// The first byte of a value that ends it, or `end`: a control character that is no tab.
static const char *end_of_value(const char *at, const char *end) {
    const uint64_t ones = UINT64_C(0x0101010101010101), tops = UINT64_C(0x8080808080808080);
    for (;;) {
        uint64_t word;
        while (end - at >= 8) {
            memcpy(&word, at, 8);
            if ((word - 32 * ones) & ~word & tops) break;
            at += 8;
        }
        while (at < end && (uint8_t)*at >= 32) at++;
        if (at == end || *at != '\t') return at;
        at++;
    }
}

// What a header line means for where the message ends, and for what uWebSockets must be spared. 0, or a status.
static int read_line(struct head *head, const char *name, size_t name_length, char *value, size_t length) {
    while (length && (*value == ' ' || *value == '\t')) value++, length--;
    while (length && (value[length - 1] == ' ' || value[length - 1] == '\t')) length--;
    switch (name_length) {
    case 4:
        if (!is(name, 4, "host")) return 0;
        if (head->has_host) return 400; // RFC 9112, 3.2
        head->has_host = true;
        return 0;
    case 6:
        if (!is(name, 6, "expect") || head->is_old) return 0;
        if (!is(value, length, "100-continue")) return 417;
        for (size_t i = 0; i < length; i++) value[i] = "100-continue"[i]; // uWebSockets knows it in lower case only
        return 0;
    case 10:
        if (!is(name, 10, "connection")) return 0;
        if (has_token(value, length, "close")) {
            head->closes = true;
            // uWebSockets looks at the first such line, and there at the length alone.
            if (length != 5 || head->has_connection) head->verdict = REWRITE;
        }
        head->has_connection = true;
        return 0;
    case 14: {
        if (!is(name, 14, "content-length")) return 0;
        uint32_t body = 0;
        if (!length) return 400;
        for (size_t i = 0; i < length; i++)
            if (value[i] < '0' || value[i] > '9') return 400;
        if (length > 9) return 400;
        for (size_t i = 0; i < length; i++) body = 10 * body + (uint32_t)(value[i] - '0');
        if (head->has_coding || (head->has_length && head->body != body)) return 400;
        head->has_length = true;
        head->body = body;
        return 0;
    }
    case 17:
        if (!is(name, 17, "transfer-encoding")) return 0;
        if (head->has_length || head->is_old) return 400;
        head->is_chunked = !head->has_coding && is(value, length, "chunked");
        head->has_coding = true;
        return 0;
    }
    return 0;
}

// Method, target and version. 0, or a status.
static int read_request_line(struct head *head, const char *line, size_t length) {
    const char *end = line + length, *at = line;
    while (at < end && NAME[(uint8_t)*at]) at++;
    head->method_length = (size_t)(at - line);
    if (at == line || at == end || *at != ' ') return 400;
    const char *target = ++at;
    while (at < end && (uint8_t)*at > 32 && *at != 127) at++;
    head->target = (size_t)(target - line);
    head->target_length = (size_t)(at - target);
    if (at == target) return 400;
    if (at == end) return 505; // HTTP/0.9
    if (end - at != 9 || memcmp(at, " HTTP/1.1", 9)) {
        if (end - at != 9 || memcmp(at, " HTTP/", 6) || at[6] < '0' || at[6] > '9' || at[7] != '.' || at[8] < '0' ||
            at[8] > '9')
            return 400;
        if (at[6] != '1') return 505;
        head->is_old = at[8] == '0';
        head->verdict = REWRITE;
    }
    if (*target == '/') return 0;
    head->verdict = REWRITE;
    // The absolute form (RFC 9112, 3.2.2) names us by what Host says too; the asterisk means all of us.
    size_t scheme = is(target, head->target_length < 7 ? 0 : 7, "http://") ? 7
                  : is(target, head->target_length < 8 ? 0 : 8, "https://") ? 8 : 0;
    if (!scheme) return head->target_length == 1 && *target == '*' && is(line, head->method_length, "options") ? 0 : 400;
    size_t skipped = scheme;
    while (skipped < head->target_length && !memchr("/?#", target[skipped], 3)) skipped++;
    if (skipped == scheme) return 400;
    head->target += skipped;
    head->target_length -= skipped;
    return 0;
}

// Whether uWebSockets has a route for it: it closes the connection without a word where a method is none of these.
static bool is_known_method(const char *method, size_t length) {
    static const char known[][8] = {"GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i]) == length && !memcmp(known[i], method, length)) return true;
    return false;
}

// Look at a head that begins at `data`, as far as it is there.
static void read_head(struct head *head, char *data, size_t length) {
    *head = (struct head){.verdict = PLAIN};
    char *end = data + length, *at = memchr(data, '\n', length);
    if (!at) {
        // What is no method will never be a request: bytes of TLS, for one.
        for (size_t i = 0; i < length && data[i] != ' '; i++)
            if (!NAME[(uint8_t)data[i]]) head->verdict = 400;
        if (head->verdict == PLAIN) head->verdict = PARTIAL;
        return;
    }
    if (at == data || at[-1] != '\r') {
        head->verdict = 400;
        return;
    }
    int refused = read_request_line(head, data, (size_t)(at - 1 - data));
    for (at++; !refused;) {
        if (at == end || (*at == '\r' && at + 1 == end)) {
            head->verdict = PARTIAL;
            return;
        }
        if (*at == '\r') {
            if (at[1] != '\n') refused = 400;
            at += 2;
            break;
        }
        char *name = at;
        uint8_t kinds = 0;
        while (at < end && NAME[(uint8_t)*at]) kinds |= NAME[(uint8_t)*at++];
        size_t name_length = (size_t)(at - name);
        if (at == end) {
            head->verdict = PARTIAL;
            return;
        }
        if (!name_length || *at != ':') {
            refused = 400; // a blank before the colon, or a line that goes on the one before (RFC 9112, 5.1 and 5.2)
            break;
        }
        char *value = ++at;
        at = (char *)end_of_value(at, end);
        if (at == end || (*at == '\r' && at + 1 == end)) {
            head->verdict = PARTIAL;
            return;
        }
        if (*at != '\r' || at[1] != '\n') {
            refused = 400;
            break;
        }
        if (kinds & 2) head->verdict = REWRITE;
        else head->lines++;
        if (name_length >= 4 && name_length <= 17) refused = read_line(head, name, name_length, value, (size_t)(at - value));
        at += 2;
    }
    head->length = (size_t)(at - data);
    if (!refused && head->length > MAX_HEAD) refused = head->target_length > MAX_TARGET ? 414 : 431;
    // Two may be added: Host and Connection.
    if (!refused && head->lines + (head->verdict == REWRITE ? 2 : 0) > MAX_HEAD_LINES) refused = 431;
    if (!refused && !head->has_host && !head->is_old) refused = 400;
    if (!refused && ((head->has_coding && !head->is_chunked) || !is_known_method(data, head->method_length))) refused = 501;
    if (refused) head->verdict = refused;
}

static char *put(char *to, const char *text, size_t length) {
    memcpy(to, text, length);
    return to + length;
}

// The same head in words that uWebSockets knows; returns its end.
static char *rewrite(char *to, const struct head *head, const char *data) {
    bool closes = head->closes || head->is_old;
    to = put(to, data, head->method_length + 1);
    if (!head->target_length || data[head->target] != '/') to = put(to, "/", 1);
    // Neither the asterisk nor a fragment, which no client should send, is a part of a path.
    if (head->target_length && !memchr("*#", data[head->target], 2)) to = put(to, data + head->target, head->target_length);
    to = put(to, " HTTP/1.1\r\n", 11);
    const char *line = (const char *)memchr(data, '\n', head->length) + 1;
    for (const char *end; *line != '\r'; line = end) {
        end = (const char *)memchr(line, '\n', head->length) + 1;
        const char *colon = line;
        uint8_t kinds = 0;
        while (*colon != ':') kinds |= NAME[(uint8_t)*colon++];
        size_t name_length = (size_t)(colon - line);
        if (kinds & 2) continue; // as nginx does: `_` and `-` are the same name to too many programs
        if (closes && is(line, name_length, "connection")) continue;
        if (head->is_old && is(line, name_length, "expect")) continue; // RFC 9110, 10.1.1
        to = put(to, line, (size_t)(end - line));
    }
    if (!head->has_host) to = put(to, "Host: \r\n", 8);
    if (closes) to = put(to, "Connection: close\r\n", 19);
    return put(to, "\r\n", 2);
}

// ---------------------------------------------------------------- on to uWebSockets

// The parser overwrites two bytes past the end, which may be the next message's.
static us_socket_t *forward(us_socket_t *s, char *data, size_t length) {
    char after[2];
    memcpy(after, data + length, 2);
    s = next_data(s, data, (int)length);
    memcpy(data + length, after, 2);
    return s;
}

// What came right behind the request for a WebSocket, which uWebSockets would throw away. Contexts are all laid out alike.
static us_socket_t *forward_frames(us_socket_t *s, char *data, size_t length) {
    on_data_t take_in = (on_data_t)((const uintptr_t *)us_socket_context(SSL, s))[data_word];
    return take_in(s, data, (int)length);
}

// A chunk of our own, around what there is of the client's: where a packet ended does not matter to the parser then.
static us_socket_t *forward_chunk(us_socket_t *s, const char *data, size_t length) {
    char *chunk = must(malloc(length + 16 + PADDING));
    int at = sprintf(chunk, "%zx\r\n", length);
    memcpy(chunk + at, data, length);
    memcpy(chunk + at + length, "\r\n", 2);
    s = forward(s, chunk, (size_t)at + length + 2);
    free(chunk);
    return s;
}

// Answer what will never be a request, and end the connection. The client may still be sending: a connection closed at
// once would be reset, and the answer lost with it.
static us_socket_t *refuse(us_socket_t *s, int status) {
    struct wire *wire = wire_of(s);
    bool waits = wire->mode != HEAD; // a request that was begun, and has to be told that it is over
    wire->mode = REFUSED;
    if (uws_ws_get_buffered_amount(SSL, s) || (waits && uws_res_has_responded(SSL, s)))
        return us_socket_close(SSL, s, 0, NULL); // in the middle of another answer
    for (int i = 0; i < refusals_known; i++)
        if (refusals[i].status == status) us_socket_write(SSL, s, refusals[i].answer, refusals[i].length, 0);
    us_socket_shutdown(SSL, s);
    if (waits) return us_socket_close(SSL, s, 0, NULL);
    us_socket_timeout(SSL, s, LINGER_S);
    return s;
}

// The value of a chunk's size line, or -1. The line ends with a CRLF; extensions are ignored (RFC 9112, 7.1.1), but may
// hold no other CR, which some take for an end (2.2).
static int64_t chunk_size(const char *line, size_t length) {
    int64_t size = 0;
    size_t at = 0;
    for (; at < length; at++) {
        char c = line[at];
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
        if (digit < 0) break;
        size = 16 * size + digit;
        if (size > 0x0fffffff) return -1;
    }
    if (!at || memchr(line, '\r', length)) return -1;
    while (at < length && (line[at] == ' ' || line[at] == '\t')) at++;
    return at == length || line[at] == ';' ? size : -1;
}

static size_t smaller(size_t one, size_t other) { return one < other ? one : other; }

// Whether PROXY, version 2, stands at `data`: its length, 0 if not, or `length` + 1 while that is not known. What it says
// is not looked at: TRUSTED_PROXIES and X-Forwarded-For tell where a request came from.
static size_t proxy_header(const char *data, size_t length) {
    static const char mark[12] = "\r\n\r\n\0\r\nQUIT\n";
    if (*data != '\r' || memcmp(data, mark, smaller(length, 12))) return 0;
    if (length < 16) return length + 1;
    size_t whole = 16 + ((size_t)(uint8_t)data[14] << 8 | (uint8_t)data[15]);
    return whole <= length ? whole : length + 1;
}

// Whether a connection has had all its answers, and its client has taken them. Else one that only sends would have as
// much kept for it as it can ask for.
static bool takes_another(us_socket_t *s) {
    return uws_res_has_responded(SSL, s) && !uws_ws_get_buffered_amount(SSL, s);
}

// Pass on the beginning of a message: how much of `data` that was, 0 when more has to come first.
static size_t take_head(us_socket_t **s, struct wire *wire, char *data, size_t length) {
    if (!wire->began) {
        size_t proxied = proxy_header(data, length);
        if (proxied) return proxied <= length ? proxied : 0;
    }
    if (*data == '\r' || *data == '\n') return 1; // RFC 9112, 2.2
    if (!takes_another(*s)) {
        if (length > MAX_WAITING) *s = us_socket_close(SSL, *s, 0, NULL);
        return 0;
    }
    struct head head;
    read_head(&head, data, length);
    if (head.verdict == PARTIAL && length > MAX_HEAD) {
        const char *end = memchr(data, '\n', length);
        head.verdict = !end || end - data > MAX_TARGET ? 414 : 431;
    }
    if (head.verdict == PARTIAL) return 0;
    if (head.verdict > PARTIAL) {
        *s = refuse(*s, head.verdict);
        return length;
    }
    wire->began = true;
    size_t body = head.is_chunked ? 0 : smaller(head.body, length - head.length);
    wire->more = length > head.length + body;
    wire->left = head.body - (uint32_t)body;
    wire->mode = head.is_chunked ? CHUNK_SIZE : wire->left ? BODY : HEAD;
    if (head.verdict == PLAIN) {
        *s = forward(*s, data, head.length + body);
    } else {
        char *made = must(malloc(head.length + ROOM_FOR_LINES + body + PADDING));
        char *end = put(rewrite(made, &head, data), data + head.length, body);
        *s = forward(*s, made, (size_t)(end - made));
        free(made);
    }
    return head.length + body;
}

// Pass on what can be of `data`, where the connection stands: how much that was, 0 when more has to come first.
static size_t take(us_socket_t **s, struct wire *wire, char *data, size_t length) {
    char *end;
    switch (wire->mode) {
    case HEAD: return take_head(s, wire, data, length);
    case BODY:
        length = smaller(length, wire->left);
        wire->left -= (uint32_t)length;
        if (!wire->left) wire->mode = HEAD;
        *s = forward(*s, data, length);
        return length;
    case CHUNK_SIZE: {
        end = memchr(data, '\n', length);
        if (!end && length <= MAX_CHUNK_LINE) return 0;
        int64_t size = end && end > data && end[-1] == '\r' ? chunk_size(data, (size_t)(end - 1 - data)) : -1;
        if (size < 0) {
            *s = refuse(*s, 400);
            return length;
        }
        wire->left = (uint32_t)size;
        wire->mode = size ? CHUNK_DATA : TRAILER;
        return (size_t)(end + 1 - data);
    }
    case CHUNK_DATA:
        length = smaller(length, wire->left);
        wire->left -= (uint32_t)length;
        if (!wire->left) wire->mode = CHUNK_END;
        *s = forward_chunk(*s, data, length);
        return length;
    case CHUNK_END:
        if (length < 2) return 0;
        if (memcmp(data, "\r\n", 2)) *s = refuse(*s, 400);
        else wire->mode = CHUNK_SIZE;
        return 2;
    case TRAILER:
        end = memchr(data, '\n', length);
        if ((end ? (size_t)(end - data) : length) + wire->left > MAX_HEAD) {
            *s = refuse(*s, 431);
            return length;
        }
        if (!end) return 0;
        if (end == data || end[-1] != '\r') { // to another, a line feed alone may end them, and begin the next request
            *s = refuse(*s, 400);
            return length;
        }
        if (end - data == 1 && *data == '\r') {
            char last[5 + PADDING] = "0\r\n\r\n";
            wire->mode = HEAD;
            wire->more = length > 2;
            *s = forward(*s, last, 5);
            return 2;
        }
        wire->left += (uint32_t)(end + 1 - data);
        return (size_t)(end + 1 - data);
    case REFUSED: break;
    }
    return length;
}

static us_socket_t *on_end(us_socket_t *s);

// uWebSockets gives a body that stops 8 to 12 s, and then hangs up without a word: longer, and the server says 408.
static us_socket_t *await_body(us_socket_t *s) {
    if (is_ours(s) && wire_of(s)->mode != HEAD && wire_of(s)->mode != REFUSED && !uws_res_has_responded(SSL, s))
        us_socket_timeout(SSL, s, BODY_S);
    return s;
}

// Have `wire_resume` go on with what a connection holds.
static void resume_soon(struct wire *wire) {
    if (wire->resumes) return;
    if (resuming_count == resuming_room) {
        resuming_room = resuming_room ? 2 * resuming_room : 64;
        resuming = must(realloc(resuming, (size_t)resuming_room * sizeof *resuming));
    }
    wire->resumes = true;
    resuming[resuming_count++] = (int)(wire - wires);
    if (resuming_count == 1) wake();
}

// Pass on what was held and what came now, message by message, and hold the rest.
static us_socket_t *sort_out(us_socket_t *s, const char *data, size_t length) {
    struct wire *wire = wire_of(s);
    size_t all = wire->held_length + length, at = 0;
    int begun = 0;
    char *buffer = must(realloc(wire->held, all + PADDING));
    if (length) memcpy(buffer + wire->held_length, data, length);
    wire->held = NULL; // what is called below may close the connection, and that frees it
    wire->held_length = 0;
    while (at < all) {
        if (wire->mode == HEAD && begun++ == AT_ONCE) {
            if (all - at > MAX_WAITING) {
                free(buffer);
                return us_socket_close(SSL, s, 0, NULL);
            }
            resume_soon(wire);
            break;
        }
        size_t taken = take(&s, wire, buffer + at, all - at);
        if (!is_ours(s)) { // closed, or a WebSocket now, whose first frames may be here
            at += taken;
            if (at < all && is_websocket(s)) s = forward_frames(s, buffer + at, all - at);
            free(buffer);
            return s;
        }
        if (!taken) break;
        at += taken;
    }
    wire->more = false;
    if (at == all) {
        free(buffer);
    } else {
        memmove(buffer, buffer + at, all - at);
        wire->held = must(realloc(buffer, all - at + PADDING));
        wire->held_length = all - at;
    }
    return wire->half_closed ? on_end(s) : await_body(s);
}

// ---------------------------------------------------------------- uSockets' handlers

static us_socket_t *on_open(us_socket_t *s, int is_client, char *ip, int ip_length) {
    int fd = us_poll_fd(s);
    if (fd >= wires_made) {
        int made = fd + 1 > 2 * wires_made ? fd + 1 : 2 * wires_made;
        wires = must(realloc(wires, (size_t)made * sizeof *wires));
        memset(wires + wires_made, 0, (size_t)(made - wires_made) * sizeof *wires);
        wires_made = made;
    }
    struct wire *wire = &wires[fd];
    free(wire->held); // of a WebSocket that had this descriptor
    *wire = (struct wire){.socket = s, .resumes = wire->resumes};
    return next_open(s, is_client, ip, ip_length);
}

static us_socket_t *on_close(us_socket_t *s, int code, void *reason) {
    struct wire *wire = wire_of(s);
    free(wire->held);
    *wire = (struct wire){.resumes = wire->resumes};
    return next_close(s, code, reason);
}

static us_socket_t *on_data(us_socket_t *s, char *data, int length) {
    struct wire *wire = wire_of(s);
    if (wire->mode == REFUSED) return s;
    if (wire->held_length) return sort_out(s, data, (size_t)length);
    if (wire->mode == BODY && (uint32_t)length <= wire->left) {
        wire->left -= (uint32_t)length;
        if (!wire->left) wire->mode = HEAD;
        return await_body(next_data(s, data, length));
    }
    if (wire->mode == HEAD && takes_another(s)) { // as nearly always: one request, or its beginning
        struct head head;
        read_head(&head, data, (size_t)length);
        if (head.verdict == PLAIN && !head.is_chunked && head.length + head.body >= (size_t)length) {
            wire->left = (uint32_t)(head.length + head.body - (size_t)length);
            if (wire->left) wire->mode = BODY;
            wire->began = true;
            return await_body(next_data(s, data, length));
        }
    }
    return sort_out(s, data, (size_t)length);
}

// What was answered has left, or some of it. Go on with what waited for that.
static us_socket_t *on_writable(us_socket_t *s) {
    s = next_writable(s);
    if (!is_ours(s)) return s;
    struct wire *wire = wire_of(s);
    bool waited = wire->mode == HEAD && (wire->held_length || wire->half_closed);
    return waited && takes_another(s) ? sort_out(s, NULL, 0) : s;
}

// The client has closed its sending half. If it has sent a whole request, it waits for the answer; else it is gone.
static us_socket_t *on_end(us_socket_t *s) {
    struct wire *wire = wire_of(s);
    bool waits = wire->mode == HEAD && (!uws_res_has_responded(SSL, s) || wire->resumes);
    if (wire->mode == REFUSED || !(waits || uws_ws_get_buffered_amount(SSL, s))) return next_end(s);
    wire->half_closed = true;
    return s;
}

// ---------------------------------------------------------------- what the server calls

// Whether the answer to come is the last on its connection; what waits behind it goes on after it.
bool wire_answers(void *res) {
    if (!context) return false;
    struct wire *wire = wire_of(res);
    if (!wire->held_length || wire->mode != HEAD) return wire->half_closed && !wire->more;
    resume_soon(wire);
    return false;
}

// Go on with what waited behind answers; to be called soon after the callback of `wire_begin`.
void wire_resume(void) {
    int count = resuming_count, *fds = resuming;
    resuming = NULL; // answers given below begin another list
    resuming_count = resuming_room = 0;
    for (int i = 0; i < count; i++) {
        struct wire *wire = &wires[fds[i]];
        wire->resumes = false;
        if (wire->socket && wire->held_length && is_ours(wire->socket)) sort_out(wire->socket, NULL, 0);
    }
    free(fds);
}

// What is answered with `status` where there is no request to answer.
void wire_refusal(int status, const char *answer, int length) {
    if (refusals_known == sizeof refusals / sizeof *refusals) abort();
    struct refusal *refusal = &refusals[refusals_known++];
    *refusal = (struct refusal){.status = status, .length = length, .answer = must(malloc((size_t)length))};
    memcpy(refusal->answer, answer, (size_t)length);
}

// Replace a handler of the context, and return the one before. uSockets has no function that says which it is: it is
// what stood where the new one stands now.
#define CONTEXT_WORDS 24 // of the structure, which has 16, and of what uWebSockets keeps behind it
static void *replaced(const uintptr_t *before, void *handler) {
    const uintptr_t *now = (const uintptr_t *)context;
    void *found = NULL;
    int changed = 0;
    for (int i = 0; i < CONTEXT_WORDS; i++) {
        if (now[i] == before[i]) continue;
        changed++;
        if (now[i] == (uintptr_t)handler) found = (void *)before[i];
        if (handler == on_data) data_word = i;
    }
    return changed == 1 ? found : NULL;
}

// Stand between the sockets that `listen_socket` accepts and uWebSockets. False where uSockets is not as we know it, and
// then nothing works.
bool wire_begin(void *listen_socket, void (*on_waiting)(void)) {
    us_socket_context_t *found = us_socket_context(SSL, listen_socket);
    if (context) return context == found;
    uintptr_t before[CONTEXT_WORDS];
    context = found;
    wake = on_waiting;
#define REPLACE(which)                                              \
    memcpy(before, context, sizeof before);                         \
    us_socket_context_on_##which(SSL, context, on_##which);         \
    next_##which = replaced(before, on_##which)
    REPLACE(open);
    REPLACE(close);
    REPLACE(data);
    REPLACE(writable);
    REPLACE(end);
    return next_open && next_close && next_data && next_writable && next_end;
}

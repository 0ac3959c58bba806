// The hot path of server/uws.py: requests that are many, and alike, wait here until Python has something for all of
// them, so that it is called once for a batch.
//
// * GETs of a target that was asked for before share an answer. A *flight* is those that came between two reads; who
//   comes after `flight_depart` takes the next one.
// * POSTs are collected, body and headers; `posts_take` gives Python those that are complete, as MessagePack.
//
// All else goes through `fallback` to Python, as any request does where this is not used. Knows uWebSockets, through
// the functions of socketify's library, and nothing of scores or of Python. One thread. What uWebSockets and Python
// hold of a request is a number, never a pointer: its generation and its place in `requests`.

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "uws_wire.h"

typedef struct uws_res uws_res_t;
typedef struct uws_req uws_req_t;
typedef void (*header_handler)(const char *name, size_t name_length, const char *value, size_t length, void *user_data);
typedef void (*data_handler)(uws_res_t *res, const char *chunk, size_t length, bool last, void *user_data);

extern void uws_res_on_aborted(int ssl, uws_res_t *res, void (*handler)(uws_res_t *, void *), void *user_data);
extern void uws_res_on_data(int ssl, uws_res_t *res, data_handler handler, void *user_data);
extern size_t uws_res_get_remote_address_as_text(int ssl, uws_res_t *res, const char **text);
extern size_t uws_req_get_full_url(uws_req_t *req, const char **value);
extern size_t uws_req_get_header(uws_req_t *req, const char *name, size_t name_length, const char **value);
extern void uws_req_for_each_header(uws_req_t *req, header_handler handler, void *user_data);
extern void socketify_res_cork_send(int ssl, uws_res_t *res, const char *body, size_t body_length, const char *status,
                                    size_t status_length, const char *content_type, size_t content_type_length,
                                    bool close_connection);
extern bool uws_res_has_responded(int ssl, uws_res_t *res);
extern void uws_res_end(int ssl, uws_res_t *res, const char *body, size_t length, bool close_connection);

enum { INTERFACE = 2 }; // one more whenever what server/uws_native.py has of this changes
enum { SSL = 0, NONE = -1 };
enum { MAX_TARGETS = 1024, TARGET_BYTES = 128, ID_BYTES = 128, HEAD_BYTES = 4096 };
enum { MAX_POST_TARGET = 1024 };     // bytes; who sends more hears of it from Python, if it is too much
enum { HEADERS_BYTES = 8192 };       // most that the headers of a POST may take to wait here
enum { KEPT_BYTES = 4096 };          // of text that a place keeps for the next request
enum { KEPT_PACKED_BYTES = 1 << 20 }; // of MessagePack
enum { PLACE_BITS = 24 };            // more connections than a process can open
#define PLACE_MASK ((UINT64_C(1) << PLACE_BITS) - 1)

// What server/uws_native.py has too: the two change together.
struct route {
    void (*fallback)(uws_res_t *res, uws_req_t *req, void *user_data); // all that is not taken in here
    void (*boarding)(int target, int flight);                          // a flight has its first request
    bool by_origin;       // whether the answer depends on who asks
    bool reads_forwarded; // whether X-Forwarded-For is wanted
    uint32_t max_body;    // in bytes
};

struct answered {
    uint64_t requests;   // those that were still there
    double sum_s;        // of how long they took, from when each was complete
    double longest_s;
    char longest_id[ID_BYTES + 1];
};

enum state { FREE, IN_FLIGHT, AWAITS_BODY, COMPLETE, TAKEN };

struct request {
    uws_res_t *res; // NULL once its client is gone
    uint64_t generation;
    double received_s;
    enum state state;
    int next; // in its flight, among the complete or among the free
    uint32_t id_length, authorization_length, key_length, forwarded_length, body_length;
    uint32_t used, room;
    char *text; // of a POST: authorization, idempotency key, forwarded for and body, one behind the other
    char id[ID_BYTES];
};

struct list {
    int first, last;
};

struct flight {
    struct list of;
    int target;
    int next_free;
};

struct target {
    size_t length;
    char text[TARGET_BYTES];
    int open; // the flight that still takes requests, or NONE
};

static struct request *requests;
static int requests_made, free_request = NONE;
static struct flight *flights;
static int flights_made, free_flight = NONE;
static struct target targets[MAX_TARGETS];
static int targets_known;
static int places[2 * MAX_TARGETS]; // of targets by hash, one more than where they are: 0 is empty
static struct list complete = {NONE, NONE};
static int open_posts;
static char *packed;
static size_t packed_used, packed_room;
static void (*wake)(void);
static char id_prefix[16];
static uint32_t id_prefix_length;
static uint64_t ids_made;

// Which of them this is: server/uws_native.py wants its own.
int native_interface(void) { return INTERFACE; }

// `prefix` begins the ids that are made here, at most 15 characters; `on_complete` is called for the first POST that is
// complete after a `posts_take`.
void native_begin(const char *prefix, void (*on_complete)(void)) {
    id_prefix_length = (uint32_t)strlen(prefix);
    memcpy(id_prefix, prefix, id_prefix_length);
    wake = on_complete;
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now); // Python's time.monotonic
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// ---------------------------------------------------------------- places

// Room for one more in a table, doubled when it is full; NULL when memory is.
static void *grown(void *table, int made, size_t size) {
    if (made & (made - 1)) return table; // no power of two
    return realloc(table, (made ? 2 * (size_t)made : 1) * size);
}

static void free_text(struct request *request) {
    free(request->text);
    request->text = NULL;
    request->room = 0;
}

static void append(struct list *list, int each) {
    requests[each].next = NONE;
    if (list->first == NONE) list->first = each;
    else requests[list->last].next = each;
    list->last = each;
}

static void let_go(int each) {
    struct request *request = &requests[each];
    if (request->state != IN_FLIGHT) open_posts--;
    if (request->room > KEPT_BYTES) free_text(request);
    request->res = NULL;
    request->state = FREE;
    request->next = free_request;
    free_request = each;
}

static uint64_t token_of(int each) { return requests[each].generation << PLACE_BITS | (uint64_t)each; }

// The place of a request that has not been let go, or NONE.
static int find(uint64_t token) {
    uint64_t place = token & PLACE_MASK;
    if (place >= (uint64_t)requests_made) return NONE;
    const struct request *request = &requests[place];
    return request->state != FREE && request->generation == token >> PLACE_BITS ? (int)place : NONE;
}

static void aborted(uws_res_t *res, void *user_data) {
    (void)res;
    int each = find((uint64_t)(uintptr_t)user_data);
    if (each == NONE) return;
    requests[each].res = NULL;
    if (requests[each].state == AWAITS_BODY) let_go(each); // nobody else knows of it
}

// X-Request-Id if it is 1 to ID_BYTES visible ASCII characters, or else one of ours.
static void name(struct request *request, uws_req_t *req) {
    const char *id;
    size_t length = uws_req_get_header(req, "x-request-id", 12, &id);
    bool good = length && length <= ID_BYTES;
    for (size_t i = 0; good && i < length; i++) good = id[i] >= 0x21 && id[i] <= 0x7e;
    if (good) {
        memcpy(request->id, id, length);
        request->id_length = (uint32_t)length;
        return;
    }
    memcpy(request->id, id_prefix, id_prefix_length);
    char *at = request->id + id_prefix_length;
    uint64_t number = ++ids_made;
    int shift = 60;
    while (shift && !(number >> shift)) shift -= 4;
    for (; shift >= 0; shift -= 4) *at++ = "0123456789abcdef"[number >> shift & 15];
    request->id_length = (uint32_t)(at - request->id);
}

// Let a request wait, and have us told when its client goes; its place, or NONE when there is none.
static int take_in(uws_res_t *res, uws_req_t *req, enum state state) {
    int each = free_request;
    if (each != NONE) {
        free_request = requests[each].next;
    } else {
        struct request *table = requests_made <= (int)PLACE_MASK ? grown(requests, requests_made, sizeof *table) : NULL;
        if (!table) return NONE;
        requests = table;
        each = requests_made++;
        requests[each] = (struct request){0};
    }
    struct request *request = &requests[each];
    request->res = res;
    request->generation++;
    request->received_s = now_s();
    request->state = state;
    if (state != IN_FLIGHT) open_posts++;
    name(request, req);
    uws_res_on_aborted(SSL, res, aborted, (void *)(uintptr_t)token_of(each));
    return each;
}

// How many places there are.
int native_places(void) { return requests_made; }

// The responses of the requests that wait here, into room for as many as there are places; how many they are.
int native_responses(uintptr_t *responses) {
    int count = 0;
    for (int each = 0; each < requests_made; each++)
        if (requests[each].res) responses[count++] = (uintptr_t)requests[each].res;
    return count;
}

// ---------------------------------------------------------------- answers

// How answers to many look: the head is the status and header lines, each after a CRLF, and the id.
struct answers {
    char head[HEAD_BYTES];
    size_t head_length; // without the id
    const char *content_type;
    size_t content_type_length;
    bool close_connection;
    double ended_s;
    const double *bounds; // inclusive
    int bound_count;
    uint64_t *counts; // by bounds, and one more for what is above
    struct answered *answered;
};

static void begin_answers(struct answers *answers, const char *head, size_t head_length) {
    static const char id[] = "\r\nX-Request-Id: ";
    if (head_length > HEAD_BYTES - sizeof id - ID_BYTES) abort(); // server/uws.py makes it, and does not make it long
    memcpy(answers->head, head, head_length);
    memcpy(answers->head + head_length, id, sizeof id - 1);
    answers->head_length = head_length + sizeof id - 1;
    answers->ended_s = now_s();
    memset(answers->answered, 0, sizeof *answers->answered);
}

// Answer one, if its client is still there, and let it go.
static void answer(struct answers *answers, int each, const char *body, size_t body_length) {
    struct request *request = &requests[each];
    uws_res_t *res = request->res;
    if (res) {
        const double took_s = answers->ended_s - request->received_s;
        int bucket = 0;
        while (bucket < answers->bound_count && took_s > answers->bounds[bucket]) bucket++;
        answers->counts[bucket]++;
        struct answered *answered = answers->answered;
        answered->requests++;
        answered->sum_s += took_s;
        if (took_s >= answered->longest_s) {
            answered->longest_s = took_s;
            memcpy(answered->longest_id, request->id, request->id_length);
            answered->longest_id[request->id_length] = 0;
        }
        memcpy(answers->head + answers->head_length, request->id, request->id_length);
        request->res = NULL;
        bool closes = wire_answers(res) || answers->close_connection;
        socketify_res_cork_send(SSL, res, body, body_length, answers->head, answers->head_length + request->id_length,
                                answers->content_type, answers->content_type_length, closes);
        // uWebSockets loses a body whose head the kernel did not take at once, but not what it is given then.
        if (!uws_res_has_responded(SSL, res)) uws_res_end(SSL, res, body, body_length, closes);
    }
    let_go(each);
}

// ---------------------------------------------------------------- flights

static int *place_of(const char *text, size_t length) {
    uint32_t hash = 2166136261u; // FNV-1a
    for (size_t i = 0; i < length; i++) hash = (hash ^ (uint8_t)text[i]) * 16777619u;
    for (;; hash++) {
        int *place = &places[hash % (2 * MAX_TARGETS)];
        if (!*place) return place;
        const struct target *found = &targets[*place - 1];
        if (found->length == length && !memcmp(found->text, text, length)) return place;
    }
}

// Let GETs of a target share their answers; its number, or NONE when it is too long. When there are too many, all are
// forgotten: those that are asked for in earnest come again, and flights that are under way know their requests.
int flight_target(const char *text, size_t length) {
    if (length > TARGET_BYTES) return NONE;
    int *place = place_of(text, length);
    if (*place) return *place - 1;
    if (targets_known == MAX_TARGETS) {
        memset(places, 0, sizeof places);
        targets_known = 0;
        place = place_of(text, length);
    }
    struct target *target = &targets[targets_known++];
    memcpy(target->text, text, length);
    target->length = length;
    target->open = NONE;
    *place = targets_known;
    return targets_known - 1;
}

static int take_flight(int target) {
    int taken = free_flight;
    if (taken != NONE) {
        free_flight = flights[taken].next_free;
    } else {
        struct flight *table = grown(flights, flights_made, sizeof *table);
        if (!table) return NONE;
        flights = table;
        taken = flights_made++;
    }
    flights[taken] = (struct flight){.of = {NONE, NONE}, .target = target};
    return taken;
}

// uWebSockets' handler of GET.
void flight_board(uws_res_t *res, uws_req_t *req, void *user_data) {
    const struct route *route = user_data;
    const char *text;
    size_t length = uws_req_get_full_url(req, &text);
    int number = length <= TARGET_BYTES ? *place_of(text, length) - 1 : NONE;
    if (number < 0 || (route->by_origin && uws_req_get_header(req, "origin", 6, &text))) {
        route->fallback(res, req, NULL);
        return;
    }
    struct target *target = &targets[number];
    bool is_first = target->open == NONE;
    int flight = is_first ? take_flight(number) : target->open;
    int each = flight == NONE ? NONE : take_in(res, req, IN_FLIGHT);
    if (each == NONE) {
        if (is_first && flight != NONE) {
            flights[flight].next_free = free_flight;
            free_flight = flight;
        }
        route->fallback(res, req, NULL);
        return;
    }
    target->open = flight;
    append(&flights[flight].of, each);
    if (is_first) route->boarding(number, flight);
}

// From now on, requests for its target take the next flight.
void flight_depart(int number) {
    struct target *target = &targets[flights[number].target];
    if (target->open == number) target->open = NONE;
}

// Answer all of a flight with the same body, and end it.
void flight_answer(int number, const char *head, size_t head_length, const char *body, size_t body_length,
                   const char *content_type, size_t content_type_length, bool close_connection, const double *bounds,
                   int bound_count, uint64_t *counts, struct answered *answered) {
    struct answers answers = {
        .content_type = content_type, .content_type_length = content_type_length,
        .close_connection = close_connection, .bounds = bounds, .bound_count = bound_count, .counts = counts,
        .answered = answered,
    };
    begin_answers(&answers, head, head_length);
    flight_depart(number);
    int next;
    for (int each = flights[number].of.first; each != NONE; each = next) {
        next = requests[each].next;
        answer(&answers, each, body, body_length);
    }
    flights[number].next_free = free_flight;
    free_flight = number;
}

// ---------------------------------------------------------------- POSTs

static bool put(struct request *request, const char *text, size_t length) {
    if (!length) return true; // `text` may be NULL then
    if (request->used + length > request->room) {
        size_t room = request->used + length + 512;
        char *grown_text = realloc(request->text, room);
        if (!grown_text) return false;
        request->text = grown_text;
        request->room = (uint32_t)room;
    }
    memcpy(request->text + request->used, text, length);
    request->used += (uint32_t)length;
    return true;
}

static bool is_forwarded(const char *name, size_t length) { return length == 15 && !memcmp(name, "x-forwarded-for", 15); }

static void add_forwarded(const char *name, size_t name_length, const char *value, size_t length, void *user_data) {
    (void)value;
    if (is_forwarded(name, name_length)) *(size_t *)user_data += length + 2;
}

// What the headers of a POST take here, at most.
static size_t length_of_headers(uws_req_t *req, const struct route *route) {
    const char *text;
    size_t length = uws_req_get_header(req, "authorization", 13, &text);
    length += uws_req_get_header(req, "idempotency-key", 15, &text);
    if (route->reads_forwarded) uws_req_for_each_header(req, add_forwarded, &length);
    return length;
}

// All X-Forwarded-For, in order, with commas between (RFC 9110, 5.3).
static void put_forwarded(const char *name, size_t name_length, const char *value, size_t length, void *user_data) {
    struct request *request = user_data;
    if (!is_forwarded(name, name_length)) return;
    if (request->forwarded_length && put(request, ", ", 2)) request->forwarded_length += 2;
    if (put(request, value, length)) request->forwarded_length += (uint32_t)length;
}

// The length that a body is said to have: 0 unless it is from 1 to `most`.
static uint32_t length_of_body(uws_req_t *req, uint32_t most) {
    const char *text;
    size_t digits = uws_req_get_header(req, "content-length", 14, &text);
    uint64_t length = 0;
    if (digits > 9) return 0;
    for (size_t i = 0; i < digits; i++) {
        if (text[i] < '0' || text[i] > '9') return 0;
        length = 10 * length + (uint64_t)(text[i] - '0');
    }
    return length <= most ? (uint32_t)length : 0;
}

static void post_data(uws_res_t *res, const char *chunk, size_t length, bool last, void *user_data) {
    (void)res;
    int each = find((uint64_t)(uintptr_t)user_data);
    if (each == NONE || requests[each].state != AWAITS_BODY) return;
    struct request *request = &requests[each];
    if (put(request, chunk, length)) request->body_length += (uint32_t)length;
    if (!last) return;
    request->received_s = now_s();
    request->state = COMPLETE;
    bool is_first = complete.first == NONE;
    append(&complete, each);
    if (is_first) wake();
}

// uWebSockets' handler of POST.
void post_begin(uws_res_t *res, uws_req_t *req, void *user_data) {
    const struct route *route = user_data;
    const char *text;
    bool alone = !length_of_body(req, route->max_body) || uws_req_get_header(req, "transfer-encoding", 17, &text) ||
                 uws_req_get_full_url(req, &text) > MAX_POST_TARGET ||
                 uws_req_get_header(req, "content-encoding", 16, &text) ||
                 (route->by_origin && uws_req_get_header(req, "origin", 6, &text)) ||
                 length_of_headers(req, route) > HEADERS_BYTES;
    int each = alone ? NONE : take_in(res, req, AWAITS_BODY);
    if (each == NONE) {
        route->fallback(res, req, NULL);
        return;
    }
    struct request *request = &requests[each];
    request->used = request->authorization_length = request->key_length = 0;
    request->forwarded_length = request->body_length = 0;
    size_t length = uws_req_get_header(req, "authorization", 13, &text);
    if (put(request, text, length)) request->authorization_length = (uint32_t)length;
    length = uws_req_get_header(req, "idempotency-key", 15, &text);
    if (put(request, text, length)) request->key_length = (uint32_t)length;
    if (route->reads_forwarded) uws_req_for_each_header(req, put_forwarded, request);
    uws_res_on_data(SSL, res, post_data, (void *)(uintptr_t)token_of(each));
}

static void pack(const void *bytes, size_t length) {
    memcpy(packed + packed_used, bytes, length);
    packed_used += length;
}

// An unsigned number of `size` bytes, most significant first, behind MessagePack's mark of its type.
static void pack_number(uint8_t type, uint64_t number, int size) {
    packed[packed_used++] = (char)type;
    while (size--) packed[packed_used++] = (char)(number >> 8 * size);
}

static void pack_bytes(const char *bytes, uint32_t length) {
    pack_number(0xc6, length, 4);
    pack(bytes, length);
}

static void pack_post(int each) {
    struct request *request = &requests[each];
    const char *text = request->text;
    uint64_t received;
    memcpy(&received, &request->received_s, sizeof received);
    packed[packed_used++] = (char)0x97; // an array of 7
    pack_number(0xcf, token_of(each), 8);
    pack_number(0xcb, received, 8);
    pack_bytes(request->id, request->id_length);
    const uint32_t lengths[] = {request->authorization_length, request->key_length, request->forwarded_length,
                                request->body_length};
    for (int i = 0; i < 4; text += lengths[i++]) pack_bytes(text, lengths[i]);
    if (request->room > KEPT_BYTES) free_text(request); // Python has it now
}

// The POSTs that are complete: a MessagePack array of [token, received_s, id, authorization, idempotency key,
// forwarded for, body]. It stays until the next call. Each has to be answered with `posts_answer`.
const char *posts_take(size_t *length) {
    enum { OVERHEAD = 64 }; // of one, beside its texts
    size_t needed = 5;
    uint32_t count = 0;
    for (int each = complete.first; each != NONE; each = requests[each].next) {
        if (!requests[each].res) continue;
        needed += OVERHEAD + requests[each].id_length + requests[each].used;
        count++;
    }
    if (needed > packed_room || (packed_room > KEPT_PACKED_BYTES && needed < packed_room / 4)) {
        free(packed);
        packed_room = 2 * needed;
        packed = malloc(packed_room);
        if (!packed) abort();
    }
    packed_used = 0;
    pack_number(0xdd, count, 4);
    int next;
    for (int each = complete.first; each != NONE; each = next) {
        next = requests[each].next;
        if (!requests[each].res) { // its client is gone already
            let_go(each);
            continue;
        }
        pack_post(each);
        requests[each].state = TAKEN;
    }
    complete = (struct list){NONE, NONE};
    *length = packed_used;
    return packed;
}

// Answer `count` of them, with the same head and bodies that stand one behind the other. A token that was answered
// before counts as one whose client is gone.
void posts_answer(const uint64_t *tokens, const uint32_t *body_lengths, int count, const char *head, size_t head_length,
                  const char *bodies, const char *content_type, size_t content_type_length, bool close_connection,
                  const double *bounds, int bound_count, uint64_t *counts, struct answered *answered) {
    struct answers answers = {
        .content_type = content_type, .content_type_length = content_type_length,
        .close_connection = close_connection, .bounds = bounds, .bound_count = bound_count, .counts = counts,
        .answered = answered,
    };
    begin_answers(&answers, head, head_length);
    for (int i = 0; i < count; bodies += body_lengths[i++]) {
        int each = find(tokens[i]);
        if (each != NONE) answer(&answers, each, bodies, body_lengths[i]);
    }
}

// Posts that have not been answered.
int posts_open(void) { return open_posts; }

// The next one, from `place` on, that was begun before that moment and still waits for its body, or is with Python: its
// token, since when, and its id, in room for ID_BYTES and a NUL. 0 behind the last.
uint64_t posts_overdue(int *place, double before_s, bool awaits_body, double *received_s, char *id) {
    const enum state state = awaits_body ? AWAITS_BODY : TAKEN;
    while (*place < requests_made) {
        int each = (*place)++;
        const struct request *request = &requests[each];
        if (request->state != state || request->received_s >= before_s) continue;
        *received_s = request->received_s;
        memcpy(id, request->id, request->id_length);
        id[request->id_length] = 0;
        return token_of(each);
    }
    return 0;
}

// Where a POST came from, as text; its length, 0 once its client is gone.
size_t post_peer(uint64_t token, const char **text) {
    int each = find(token);
    return each != NONE && requests[each].res ? uws_res_get_remote_address_as_text(SSL, requests[each].res, text) : 0;
}

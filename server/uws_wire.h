// What server/uws_native.c has of server/uws_wire.c.

#include <stdbool.h>

bool wire_answers(void *res);

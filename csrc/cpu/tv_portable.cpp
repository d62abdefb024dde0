#define DR_ISA isa_portable
#define DR_TABLE tv_portable
#include "tv.inc"

#define DR_ISA isa_avx2
#define DR_TABLE tv_avx2
#include "tv.inc"

#define DR_ISA isa_avx512
#define DR_TABLE tv_avx512
#include "tv.inc"

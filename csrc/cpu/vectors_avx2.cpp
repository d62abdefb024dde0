#define DR_ISA isa_avx2
#define DR_TABLE vectors_avx2
#include "vectors.inc"

#define DR_ISA isa_avx512
#define DR_TABLE vectors_avx512
#include "vectors.inc"

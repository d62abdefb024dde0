#define DR_ISA isa_avx512
#define DR_TABLE tomography_avx512
#include "tomography.inc"

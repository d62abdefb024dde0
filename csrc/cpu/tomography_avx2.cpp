#define DR_ISA isa_avx2
#define DR_TABLE tomography_avx2
#include "tomography.inc"

#define DR_ISA isa_portable
#define DR_TABLE tomography_portable
#include "tomography.inc"

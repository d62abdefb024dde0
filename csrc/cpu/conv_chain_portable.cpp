#define DR_ISA isa_portable
#define DR_TABLE portable
#include "conv_chain.inc"

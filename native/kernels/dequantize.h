// dequantize
#define DEQUANTIZE_TABLE {0}

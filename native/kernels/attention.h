// attention
static void op_attention(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_attention_step(worker *w, const pyg_step *s) { (void)w; (void)s; }
static int64_t scratch_attention(const pyg_plan *plan, const pyg_step *s) { (void)plan; (void)s; return 0; }

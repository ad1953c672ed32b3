// rope
static void op_rope_table(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_rope(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_store(worker *w, const pyg_step *s) { (void)w; (void)s; }

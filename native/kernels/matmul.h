// matmul
static void op_mul_mat(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_glu_mat(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_prepare(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_mul_mat_id(worker *w, const pyg_step *s) { (void)w; (void)s; }
static void op_glu_mat_id(worker *w, const pyg_step *s) { (void)w; (void)s; }
static int64_t scratch_mul_mat(const pyg_plan *plan, const pyg_step *s) { (void)plan; (void)s; return 0; }
static int64_t scratch_mul_mat_id(const pyg_plan *plan, const pyg_step *s) { (void)plan; (void)s; return 0; }

# Solves systems of equations; says "tick N ok" for each that is solved.
cat("ready\n")
n <- 0
while (!file.exists("stop")) {
  m <- matrix(rnorm(2500), 50)
  cat("tick", n, if (abs(sum(solve(m) %*% m) - 50) < 1e-3) "ok" else "wrong", "\n")
  n <- n + 1
  Sys.sleep(0.02)
}
quit(status = 3)

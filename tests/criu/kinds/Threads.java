// Threads that count in a map; says "tick N ok" while all of them count on.
import java.io.File;
import java.util.concurrent.ConcurrentHashMap;

public class Threads {
    public static void main(String[] arguments) throws Exception {
        ConcurrentHashMap<Integer, Long> counts = new ConcurrentHashMap<>();
        for (int number = 0; number < 3; number++) {
            final int mine = number;
            counts.put(mine, 0L);
            Thread thread = new Thread(() -> {
                while (true) {
                    counts.merge(mine, 1L, Long::sum);
                    try {
                        Thread.sleep(1);
                    } catch (InterruptedException error) {
                        return;
                    }
                }
            });
            thread.setDaemon(true);
            thread.start();
        }
        System.out.println("ready");
        for (long n = 0; !new File("stop").exists(); n++) {
            long[] before = {counts.get(0), counts.get(1), counts.get(2)};
            boolean all = false;
            for (int tries = 0; tries < 1000 && !all; tries++) {
                Thread.sleep(5);
                all = counts.get(0) > before[0] && counts.get(1) > before[1] && counts.get(2) > before[2];
            }
            System.out.println("tick " + n + (all ? " ok" : " wrong"));
        }
        System.exit(3);
    }
}

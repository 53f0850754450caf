// Goroutines, and an HTTP server that the program asks itself; says "tick N ok" while it answers.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	numbers := make(chan int)
	for k := 0; k < 4; k++ {
		go func() {
			for i := 0; ; i++ {
				numbers <- i
				time.Sleep(time.Millisecond)
			}
		}()
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "pong") }))
	fmt.Println("ready")
	for n := 0; ; n++ {
		for k := 0; k < 20; k++ {
			<-numbers
		}
		word := "wrong"
		if answer, err := http.Get("http://" + listener.Addr().String()); err == nil {
			if text, _ := io.ReadAll(answer.Body); string(text) == "pong" {
				word = "ok"
			}
			answer.Body.Close()
		}
		fmt.Println("tick", n, word)
		if _, err := os.Stat("stop"); err == nil {
			os.Exit(3)
		}
	}
}
